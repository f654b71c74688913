"""Sweeps: DVC experiments over values of parameters, and one page over all of them."""
