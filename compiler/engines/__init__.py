"""`regcache build`: TensorRT engines of an artifact."""
