"""`regcache bench`: how fast an artifact is beside the source it came from."""
