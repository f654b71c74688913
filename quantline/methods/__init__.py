"""Quantization methods. A method sees one weight matrix and its statistics, never a model."""
