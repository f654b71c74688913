"""Measurements beside peers. `quantline` comes first: what it sets of OpenMP has to be there before torch is imported."""

import quantline  # noqa: F401
