"""The pipeline, register curation, targets, artifact and command line.

Private: this may change without notice. The public interface is `regcache` itself,
`regcache.passes` and the command line; docs/architecture.md says what stands where.
"""
