"""What activations look like, and the number formats and ranges that follow."""
