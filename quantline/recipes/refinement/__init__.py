"""Refinement: scales and norms of a rounded model, tuned by the KL divergence of the whole."""
