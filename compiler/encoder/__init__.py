"""From a source to a float encoder in the form that passes read."""
