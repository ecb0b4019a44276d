"""From a float encoder to integers: rotate, shift, equalize, place, round."""
