"""What a compilation will do, step by step, and what that costs."""
