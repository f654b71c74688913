"""A GPU beside the CPU."""
