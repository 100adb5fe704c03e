#!/bin/sh
# What only a GPU can show, in one command: tests/gpu/run.sh
#
# Installs the package in .venv-gpu, or takes what PYTHON names with all that is installed there. Then tests/gpu; the
# kernels' tests again under each tool of compute-sanitizer; benchmarks/similarity.py --device cuda, into
# benchmarks/results. A step that fails, or takes LIMIT seconds, does not keep the next from its turn; the
# exit status is their number.
# Needs an NVIDIA driver, the CUDA toolkit (nvcc, compute-sanitizer) and, without PYTHON, Python >= 3.10 and an index.
set -u
cd "$(dirname "$0")/../.." || exit 1
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
export PATH="$CUDA_HOME/bin:$PATH"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv-gpu/bin/python
    CUDACXX="${CUDACXX:-$(command -v nvcc)}" || { echo "no nvcc in PATH or $CUDA_HOME/bin" >&2; exit 1; }
    export CUDACXX CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
    major=$("$CUDACXX" --version | sed -n 's/.*release \([0-9]*\).*/\1/p')
    faiss=faiss-cpu
    [ "$(uname -m)" = x86_64 ] && faiss=faiss-cuda  # a wheel for no other
    {
        python3 -m venv --system-site-packages .venv-gpu &&  # JetPack's TensorRT is a package of the system
        $PYTHON -m pip install --quiet '.[gpu]' 'onnxruntime-gpu[cuda,cudnn]' "cuda-bindings==$major.*" \
            pytest hypothesis scipy torch "$faiss"
    } || exit 1
fi

failed=0
step() {
    echo "== $*"
    timeout -k 9 "${LIMIT:-1800}" "$@" || { failed=$((failed + 1)); echo "== failed: $*"; return 1; }
}
step $PYTHON -c '
from vmad_edge.kernels import cuda
from vmad_edge.runtime.device import Device
cuda.try_kernels(device := Device())
print(device.name, "runs kernels for", cuda.targets())' || exit 1  # the tests would only be skipped
step $PYTHON -m pytest tests/gpu
for tool in memcheck racecheck initcheck synccheck; do
    step compute-sanitizer --tool $tool --error-exitcode 9 $PYTHON -m pytest -q -x tests/gpu/test_cuda.py
done
step $PYTHON benchmarks/similarity.py --device cuda --sizes 256x256 256x2560 576x115200 1369x273800 --save
exit $failed
