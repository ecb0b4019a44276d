"""A compilation as it is asked for: its options, its target, where it works."""
