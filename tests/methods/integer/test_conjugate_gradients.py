"""Conjugate gradients against the solution of the system."""

from itertools import pairwise

import torch

from quantline.methods.integer import conjugate_gradients
from tests.helpers.layers import correlated_moments


def test_solve_comes_to_the_solution_and_each_step_lowers_the_quadratic_form():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.stack([correlated_moments(6, generator) for _ in range(2)])
    right = torch.randn(2, 1, 6, generator=generator)
    diagonal = matrix.diagonal(dim1=1, dim2=2)[:, None]
    values = []
    for steps in (0, 1, 2, 3, 12):
        x = conjugate_gradients.solve(lambda x: x @ matrix, diagonal, right, steps)
        values.append(((x @ matrix) * x - 2 * right * x).sum((1, 2)))
    assert (values[0] == 0).all()
    for before, after in pairwise(values):
        assert (after < before + 1e-5).all()
    assert torch.allclose(x @ matrix, right, atol=1e-3)


def test_solve_leaves_zero_where_the_diagonal_is_not_positive():
    diagonal = torch.tensor([[[2.0, 0.0]]])
    right = torch.tensor([[[4.0, 1.0]]])
    x = conjugate_gradients.solve(lambda x: x * diagonal, diagonal, right, 2)
    assert torch.equal(x, torch.tensor([[[2.0, 0.0]]]))
