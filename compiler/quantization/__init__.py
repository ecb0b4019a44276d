"""From a float encoder to integers: rotate, equalize, keep float, round, Q/DQ."""
