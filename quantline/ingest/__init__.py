"""Bringing a checkpoint in: fetching, verifying, merging adapters, converting."""
