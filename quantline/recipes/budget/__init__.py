"""Fitting a recipe to a size: which type each tensor gets."""
