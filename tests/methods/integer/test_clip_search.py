"""Clipped ranges: never worse than whole ones, and the same from kernel and tensors."""

import pytest
import torch

from quantline.methods.integer.clip_search import best_grids_at_once, fit_grids
from quantline.methods.integer.grid import Grid, nearest_integers, split_groups
from tests.helpers.layers import uneven_layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fit_grids_with_importance_is_never_worse_than_over_the_whole_range(bits):
    weight, hessian = uneven_layer(3)
    importance = hessian.diagonal()
    grid = Grid(bits, 16, False)

    def weighted_errors(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        groups = split_groups(weight, grid)
        scale = scales[..., None]
        zero = zeros[..., None]
        rounded = (nearest_integers(groups, scale, zero, grid) - zero) * scale
        return (((rounded - groups) ** 2) * importance.reshape(1, -1, 16)).sum(-1)

    whole = weighted_errors(*fit_grids(weight, grid))
    clipped = weighted_errors(*fit_grids(weight, grid, importance))
    assert (clipped <= whole * (1 + 1e-6)).all()
    assert bits == 8 or (clipped < whole).any()


def test_best_grids_of_the_kernel_are_those_of_all_groups_at_once(monkeypatch):
    weight, hessian = uneven_layer(15, rows=64)
    grid = Grid(3, 16, False)
    scales, zeros = fit_grids(weight, grid, hessian.diagonal())
    module = "quantline.methods.integer.clip_search"
    monkeypatch.setattr(f"{module}.best_grids", best_grids_at_once)
    other_scales, other_zeros = fit_grids(weight, grid, hessian.diagonal())
    assert (scales == other_scales).float().mean() > 0.99
    assert (zeros == other_zeros).float().mean() > 0.99
