"""`regcache parity`: how close an artifact is to its original."""
