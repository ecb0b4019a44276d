"""Graph passes, the encoder view and the small shared types."""
