"""Sources of vision encoders, made into ONNX with their preprocessing.

Private: this may change without notice. The public interface is `regcache` itself.
"""
