"""The pipeline, register curation, targets, artifact and command line."""
