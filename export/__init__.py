"""Sources of vision encoders, made into ONNX with their preprocessing. Private: it may change."""
