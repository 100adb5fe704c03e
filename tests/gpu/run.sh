#!/bin/sh
# What only a GPU can show, in one command: tests/gpu/run.sh
#
# Builds the package in .venv-gpu, runs tests/gpu, runs the kernels' tests again under each tool of compute-sanitizer, and
# measures benchmarks/similarity.py --device cuda into benchmarks/results. Needs an NVIDIA driver, the CUDA toolkit
# (nvcc, compute-sanitizer), Python >= 3.10, and pip with an index, or a .venv-gpu that has everything (OFFLINE=1).
set -eu
cd "$(dirname "$0")/../.."
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export PATH="$CUDA_HOME/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
export CUDACXX="${CUDACXX:-$(command -v nvcc)}"
PYTHON=.venv-gpu/bin/python

if [ -z "${OFFLINE:-}" ]; then
    # JetPack's TensorRT is a package of the system
    [ -x $PYTHON ] || ${BASE_PYTHON:-python3} -m venv --system-site-packages .venv-gpu
    $PYTHON -m pip install --quiet --upgrade pip
    CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" $PYTHON -m pip install --quiet 'llama-cpp-python==0.3.36'
    $PYTHON -m pip install --quiet '.[gpu]' 'onnxruntime-gpu[cuda,cudnn]' pytest hypothesis scipy torch faiss-cpu
fi

$PYTHON -c 'from vmad_edge.kernels import cuda; print("kernels:", cuda.targets())'
$PYTHON -m pytest tests/gpu
for tool in memcheck racecheck initcheck synccheck; do
    echo "compute-sanitizer --tool $tool"
    compute-sanitizer --tool $tool --error-exitcode 9 $PYTHON -m pytest -q -x tests/gpu/test_cuda.py
done
$PYTHON benchmarks/similarity.py --device cuda --sizes 256x256 256x2560 576x115200 1369x273800 --save
