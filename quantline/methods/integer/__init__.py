"""Methods for integers in groups and for eight-bit floats."""
