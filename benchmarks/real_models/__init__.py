"""Real trained models and real texts, out of packages on the index."""
