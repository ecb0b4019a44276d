"""`regcache reproduce`: the paper's tables on one's own images."""
