"""ONNX Runtime sessions, image readers, parity and benchmarks.

Private: this may change without notice. The public interface is `regcache` itself.
"""
