"""torch → ONNX, one file an engine."""
