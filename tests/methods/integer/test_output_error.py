"""The error of a rounding against the layer's outputs, written out."""

import pytest
import torch

from quantline.methods.integer.grid import Grid
from quantline.methods.integer.output_error import choose_rows, output_error, row_dots
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import errors_of, uneven_layer


def test_output_error_is_the_squared_error_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(200, 16, generator=generator)
    weight = torch.randn(5, 16, generator=generator)
    other = weight + 0.1 * torch.randn(5, 16, generator=generator)
    expected = ((inputs @ (other - weight).T) ** 2).mean(0).sum()
    hessian = inputs.T @ inputs / 200
    assert output_error(weight, other, hessian) == pytest.approx(float(expected), rel=1e-5)


def test_choose_rows_takes_the_better_row_of_each():
    weight, hessian = uneven_layer(2)
    grid = Grid(3, 16, False)
    first = round_to_nearest(weight, grid)
    second = round_to_nearest(weight, grid, hessian.diagonal())
    errors = torch.stack([errors_of(first, weight, hessian), errors_of(second, weight, hessian)])
    assert 0 < (errors[1] < errors[0]).sum() < len(weight)
    chosen = choose_rows(weight, hessian, first, second)
    assert torch.equal(errors_of(chosen, weight, hessian), errors.amin(0))


def test_row_dots_are_summed_in_double_precision():
    first = torch.tensor([[3e7, 1.0, -3e7], [1.0, 2.0, 3.0]])
    second = torch.tensor([[3e7, 0.5, 3e7], [4.0, 5.0, 6.0]])
    expected = torch.tensor([0.5, 32.0], dtype=torch.float64)
    assert torch.equal(row_dots(first, second), expected)
    assert torch.equal(row_dots(first.T, first.T), first.double().square().sum(0))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_row_dots_are_the_same_bits_for_any_number_of_threads(threads):
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 13, 1001, generator=generator)
    expected = row_dots(first, second)
    assert torch.allclose(expected, (first.double() * second).sum(1), rtol=1e-12)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(row_dots(first, second), expected)
    finally:
        torch.set_num_threads(before)


def test_row_dots_of_no_rows_are_none():
    assert len(row_dots(torch.zeros(0, 8), torch.zeros(0, 8))) == 0
