"""Device side: a frame becomes an Inspection. No torch, no network."""

import os
import sys

# Nobody calls home. ONNX Runtime and OpenVINO do when they are imported (an id in the home folder, their makers' hosts
# looked up), and nothing that one calls later stops them. So this is said before either is.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then takes its stub
