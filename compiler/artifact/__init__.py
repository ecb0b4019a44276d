"""The artifact: its files, its manifest and seal, and what runs it."""
