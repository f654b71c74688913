"""AWQ's scales of inputs (Lin et al. 2023, section 3.2) for ggml's blocks.

Columns that share a sub-block are made alike. The direction is that of
quantline/methods/integer/awq_scales.py, where each type counts by the step of its grid; how far to
go is judged by what ggml's own rounding of the scaled weights leaves of tr(G Δ H Δᵀ).
"""

import numpy as np
import torch

from quantline.methods.ggml.block_types import block_type, dequantize_blocks
from quantline.methods.ggml.quantize import LARGEST_WEIGHT, quantize_blocks
from quantline.methods.integer.awq_scales import search_expected_scales
from quantline.methods.integer.curvature import divergence
from quantline.methods.method import InputScales

# How far to go to the scales with the least expected error, in their logarithms.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEARCH_STEPS = 20  # exponents that the search of the direction starts from
# Of a weight, whose divergences tell the strengths apart; but all that one block of G spans.
JUDGED_ROWS = 512


def search_direction(
    weights: list[torch.Tensor],
    ggml_types: list[str],
    hessian: torch.Tensor,
    fisher_out: list[torch.Tensor],
) -> torch.Tensor:
    """Return the logarithms [in] of the scales with the least expected error.

    Arguments are as in `search_scales`. An output counts by its second moment of the gradient and
    by the step of its weight's grid.
    """
    importance = []
    sub_block_size = 0
    for ggml_type, fisher in zip(ggml_types, fisher_out, strict=True):
        known = block_type(ggml_type)
        steps = len(known.levels) - 1 - known.lowest_code
        importance.append(fisher.diagonal(dim1=-2, dim2=-1).reshape(-1) / steps**2)
        sub_block_size = max(sub_block_size, known.sub_block_size)
    scales = search_expected_scales(weights, hessian, sub_block_size, SEARCH_STEPS, importance)
    return scales.log()


def remaining_divergences(
    weights: list[torch.Tensor],
    ggml_types: list[str],
    hessian: torch.Tensor,
    fisher_out: list[torch.Tensor],
    scales: torch.Tensor,
    divisors: list[torch.Tensor],
) -> list[float]:
    """Return the tr(G Δ H Δᵀ) of each weight that ggml's rounding leaves with these scales [in].

    It is infinite where ggml cannot hold the scaled weight.

    The other arguments are as in `search_scales`.
    """
    importance = (hessian.diagonal() / scales**2).numpy()
    divergences = []
    for weight, ggml_type, fisher, divisor in zip(
        weights, ggml_types, fisher_out, divisors, strict=True
    ):
        scaled = (weight * scales / divisor[:, None]).numpy()
        if np.abs(scaled).max() > LARGEST_WEIGHT:  # NaN is refused below
            divergences.append(float("inf"))
            continue
        blocks = quantize_blocks(scaled, ggml_type, importance, kernel="numba")
        rounded = torch.from_numpy(dequantize_blocks(blocks, ggml_type))
        stored = rounded * divisor[:, None] / scales
        divergences.append(divergence(stored - weight, hessian, fisher))
    return divergences


def judged_rows(
    weight: torch.Tensor, fisher: torch.Tensor, divisor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the part of a weight, of G and of the divisors by which strengths are told apart.

    It is of about JUDGED_ROWS outputs: whole blocks of G, evenly spread.
    """
    every = -(-len(weight) // JUDGED_ROWS)
    rows = weight.reshape(len(fisher), -1, weight.shape[1])[::every]
    divisors = divisor.reshape(len(fisher), -1)[::every]
    return rows.flatten(0, 1), fisher[::every], divisors.flatten()


def search_scales(
    weights: list[torch.Tensor],
    ggml_types: list[str],
    hessian: torch.Tensor,
    fisher_out: list[torch.Tensor],
    divisors: list[torch.Tensor],
) -> InputScales:
    """Search the scales of an input; a strength of 0 is no scaling at all.

    With scales no layer is left with a larger tr(G Δ H Δᵀ) than ggml's rounding of the weight as it
    is leaves, by the outputs that are looked at (`judged_rows`).

    Args:
        weights: The weights that read the input, float32 [out, in] each.
        ggml_types: The type that each is to have.
        hessian: H of the input [in, in].
        fisher_out: G of each weight's outputs in diagonal blocks [blocks, n, n].
        divisors: Scales of the next layer's input, folded into these rows as divisors [out].

    Returns:
        The scales with their strength, from 0 for none to 1 for those of least expected error.

    Raises:
        StageError: non_finite, as quantize_blocks does.
    """
    no_scales = torch.ones_like(hessian[0])
    judged = [judged_rows(*parts) for parts in zip(weights, fisher_out, divisors, strict=True)]
    judged_weights, judged_fisher, judged_divisors = map(list, zip(*judged, strict=True))
    no_divisors = [torch.ones_like(divisor) for divisor in judged_divisors]

    def divergences(scales: torch.Tensor, row_divisors: list[torch.Tensor]) -> list[float]:
        return remaining_divergences(
            judged_weights, ggml_types, hessian, judged_fisher, scales, row_divisors
        )

    limits = divergences(no_scales, no_divisors)
    direction = search_direction(weights, ggml_types, hessian, fisher_out)
    least = float("inf")
    best = InputScales(no_scales, 0.0)
    for strength in STRENGTHS:
        scales = (direction * strength).exp()
        scales = scales / (scales.max() * scales.min()).sqrt()
        values = divergences(scales, judged_divisors)
        within = [value <= limit for value, limit in zip(values, limits, strict=True)]
        if (strength == 0 or all(within)) and sum(values) < least:
            least = sum(values)
            best = InputScales(scales, strength)
    return best
