"""`regcache bundle`: folders for Triton and for edge devices."""
