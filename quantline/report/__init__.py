"""The Compression page: the decision, the figures behind it, and where they come from."""
