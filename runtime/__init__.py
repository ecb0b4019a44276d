"""ONNX Runtime sessions, image readers, parity and benchmarks. Private: it may change."""
