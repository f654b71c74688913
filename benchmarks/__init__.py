"""Measurements beside peers. `stages` comes first: what it sets of OpenMP has to be there before torch is imported."""

import stages  # noqa: F401
