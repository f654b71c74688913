"""Measuring a bundle in its runtime against the unquantized model."""
