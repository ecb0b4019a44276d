"""The job of a compilation: its options, its target, and the context of its stages."""
