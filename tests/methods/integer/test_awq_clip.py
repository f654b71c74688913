"""AWQ's clipping search against all that could be tried, and the laws that it has to keep."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantline.methods.integer.awq_clip import CLIP_RATIOS, quantize_clipped
from quantline.methods.integer.grid import Grid, fit_range, group_range, nearest_integers
from quantline.methods.integer.output_error import row_errors
from quantline.methods.integer.round_to_nearest import round_to_nearest
from tests.helpers.layers import error_of, errors_of, uneven_layer


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (4, False), (8, False)])
def test_quantize_clipped_clips_a_row_only_where_it_gains(bits, symmetric):
    weight, hessian = uneven_layer(9)
    grid = Grid(bits, 16, symmetric)
    before = errors_of(round_to_nearest(weight, grid), weight, hessian)
    after = errors_of(quantize_clipped(weight, hessian, grid), weight, hessian)
    assert (after <= before).all()
    assert after.sum() < (0.9 if bits < 8 else 1.0) * before.sum()


@given(st.integers(0, 10_000), st.sampled_from([(2, False), (3, True), (4, False)]))
def test_quantize_clipped_finds_the_best_range_of_an_only_group(seed, bits_and_symmetry):
    """With one group and inputs that are not correlated every pair of ratios can be tried out."""
    weight, hessian = uneven_layer(seed, rows=3, width=16)
    hessian = torch.diag(hessian.diagonal())
    bits, symmetric = bits_and_symmetry
    grid = Grid(bits, 16, symmetric)
    groups = weight[:, None]
    low, high = group_range(groups)
    first_scale, first_zero = fit_range(low, high, grid)
    first_steps = nearest_integers(groups, first_scale, first_zero, grid) - first_zero
    errors = []
    first_errors = []  # of the min-max grid's integers on the other scales
    for low_ratio in CLIP_RATIOS:
        for high_ratio in CLIP_RATIOS:
            if symmetric and low_ratio != high_ratio:
                continue
            scale, zero = fit_range(low * low_ratio, high * high_ratio, grid)
            rounded = (nearest_integers(groups, scale, zero, grid) - zero) * scale
            errors.append(row_errors(weight, rounded[:, 0], hessian))
            first_errors.append(row_errors(weight, (first_steps * scale)[:, 0], hessian))
    assert len(errors) == len(CLIP_RATIOS) ** (1 if symmetric else 2)
    least, best = torch.stack(errors).min(0)
    expected = torch.minimum(least, torch.stack(first_errors).gather(0, best[None])[0])
    found = errors_of(quantize_clipped(weight, hessian, grid), weight, hessian)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_quantize_clipped_clips_groups_together_that_change_each_others_errors():
    """Each group alone has the best range; all of them together have not."""
    weight, hessian = uneven_layer(14, rows=64)
    grid = Grid(3, 16, False)
    within_groups = hessian * torch.block_diag(*torch.ones(4, 16, 16))
    together = error_of(quantize_clipped(weight, hessian, grid), weight, hessian)
    alone = error_of(quantize_clipped(weight, within_groups, grid), weight, hessian)
    assert together < 0.95 * alone
