"""Trying a bundle in the runtime that will serve it."""
