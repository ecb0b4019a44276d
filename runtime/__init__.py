"""ONNX Runtime sessions, image readers, parity and benchmarks."""
