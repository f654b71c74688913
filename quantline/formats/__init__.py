"""Containers: how quantized weights become a bundle that a runtime loads."""
