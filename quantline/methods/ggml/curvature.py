"""Curvature rounding within ggml's grids.

The file and its size are those of a k-quant, and the KL divergence is less. First comes GPTQ's
error feedback (error_feedback.py). Then come rounds over everything that the blocks store: scales,
minima, d and dmin (scale_refit.py), and after them the codes, down tr(G Δ H Δᵀ), which the
divergence follows (quantline/methods/integer/curvature.py).
"""

from typing import Any, ClassVar

import numpy as np
import torch

from quantline.methods.ggml.block_types import block_type
from quantline.methods.ggml.blocks import Blocks, BlockType
from quantline.methods.ggml.error_feedback import quantize_with_feedback
from quantline.methods.ggml.method import BlockMethod
from quantline.methods.ggml.quantize import quantize_blocks
from quantline.methods.ggml.scale_refit import difference_of, refit_scales
from quantline.methods.integer.curvature import DAMPING_OUT, add_damping
from quantline.methods.integer.curvature_descent import descend
from quantline.methods.kquant_curvature import KQuantCurvatureRecipe
from quantline.methods.method import LayerStatistics

ROUNDS = 4  # scales and codes in turn; by then the divergence hardly falls any more
# Share of the mean diagonal that the rounds add to H. On unseen text this is better than the share
# of integer/curvature.py.
DAMPING_IN = 0.1


class KQuantCurvature(BlockMethod[KQuantCurvatureRecipe]):
    """Curvature rounding of calibrated layers; all other tensors are rounded by ggml."""

    preview_rounding: ClassVar[str] = "ggml, with gptq's error feedback in the blocks"

    @property
    def scales_inputs(self) -> bool:
        """Whether layers that share an input are scaled together before rounding."""
        return self.recipe.scaling

    def quantize(
        self,
        weight: np.ndarray,
        ggml_type: str,
        importance: np.ndarray | None,
        statistics: LayerStatistics | None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Round one tensor; the report says how much was added to the Hessian's diagonal."""
        if statistics is None:
            return self._round_by_ggml(weight, ggml_type, importance), {}
        rounds = self.recipe.rounds
        blocks, damping = self._round(weight, ggml_type, statistics, rounds)
        return blocks, {"damping": damping}

    def preview(
        self,
        weight: np.ndarray,
        ggml_type: str,
        importance: np.ndarray | None,
        statistics: LayerStatistics | None,
    ) -> np.ndarray:
        """Round one tensor with error feedback and without the rounds."""
        if statistics is None:
            return self._round_by_ggml(weight, ggml_type, importance)
        return self._round(weight, ggml_type, statistics, rounds=0)[0]

    def _round_by_ggml(
        self, weight: np.ndarray, ggml_type: str, importance: np.ndarray | None
    ) -> np.ndarray:
        kernel = self.recipe.search_kernel
        return quantize_blocks(weight, ggml_type, importance, kernel=kernel)

    def _round(
        self, weight: np.ndarray, ggml_type: str, statistics: LayerStatistics, rounds: int
    ) -> tuple[np.ndarray, float]:
        assert statistics.fisher_out is not None, "curvature rounding needs G"
        return quantize_by_curvature(
            weight,
            ggml_type,
            statistics.hessian.cpu().numpy(),
            statistics.fisher_out.cpu().numpy(),
            self.recipe.damping,
            rounds,
        )


def descend_codes(
    weight: torch.Tensor,
    block_type: BlockType,
    blocks: Blocks,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    product: torch.Tensor | None = None,
) -> Blocks:
    """Move codes to where tr(G Δ H Δᵀ) is less, in one pass of `curvature_descent.descend`.

    Scales, minima, and codes whose scale is zero do not change.

    Args:
        weight: float32 [out, in].
        block_type: The blocks' type.
        blocks: Those of the weight, row by row.
        hessian: H [in, in].
        fisher_out: G in diagonal blocks [blocks, n, n].
        product: Δ H [out, in], if it is known; it is changed to that of the new blocks.

    Returns:
        The blocks with the new codes.
    """
    size = block_type.sub_block_size
    scale = torch.from_numpy(blocks.grid[0].repeat(size, 1)).reshape(weight.shape)
    levels = torch.from_numpy(block_type.levels)
    codes = torch.from_numpy(blocks.codes).reshape(weight.shape)
    has_no_scale = scale == 0
    # A weight without a scale gets a grid of one point, so that it does not move.
    steps = torch.where(has_no_scale, 0, levels[codes.long()])
    low = torch.where(has_no_scale, 0, levels[block_type.lowest_code].expand_as(scale))
    high = torch.where(has_no_scale, 0, levels[-1].expand_as(scale))
    step_size = torch.where(has_no_scale, 1, scale)
    if product is None:
        product = difference_of(weight, block_type, blocks) @ hessian
    moved = descend(
        steps,
        low,
        high,
        step_size,
        product,
        hessian,
        fisher_out,
        None if block_type.is_uniform else levels,
    )
    # A search takes longer than a pass of the descent.
    found = moved - levels[0] if block_type.is_uniform else torch.searchsorted(levels, moved)
    new_codes = found.to(torch.uint8)
    codes = torch.where(has_no_scale, codes, new_codes)
    return Blocks(
        codes.numpy().reshape(blocks.codes.shape),
        blocks.scales,
        blocks.minima,
        blocks.d,
        blocks.dmin,
    )


def _cost(difference: torch.Tensor, product: torch.Tensor, fisher_out: torch.Tensor) -> float:
    """Return tr(G Δ H Δᵀ) from Δ and Δ H [out, in], with G in diagonal blocks."""
    rows = (len(fisher_out), -1, difference.shape[1])
    weighted = fisher_out @ product.reshape(rows)
    return float((weighted * difference.reshape(rows)).sum(dtype=torch.float64))


def quantize_by_curvature(
    weight: np.ndarray,
    ggml_type: str,
    hessian: np.ndarray,
    fisher_out: np.ndarray,
    damping: float = 0.01,
    rounds: int = ROUNDS,
) -> tuple[np.ndarray, float]:
    """Round a weight to where the KL divergence rises least.

    Args:
        weight: float32 [out, in].
        ggml_type: One of BLOCK_TYPES.
        hessian: H, float32 [in, in].
        fisher_out: G, the diagonal blocks of the second moments of the output gradient, float32
            [blocks, n, n].
        damping: Share of the mean diagonal that the error feedback adds to H.
        rounds: Rounds over scales and codes after it.

    Returns:
        The blocks uint8 [out, bytes per row], and the damping that was used.

    Raises:
        StageError: non_finite, if a weight is not finite; as inverse_factor.inverse_factor does.
    """
    known = block_type(ggml_type)
    matrix = torch.from_numpy(np.ascontiguousarray(weight))
    inputs = torch.from_numpy(np.ascontiguousarray(hessian))
    outputs = torch.from_numpy(np.ascontiguousarray(fisher_out))
    damped_inputs = add_damping(inputs, DAMPING_IN)
    damped_outputs = add_damping(outputs, DAMPING_OUT)

    blocks, damping = quantize_with_feedback(matrix, known, inputs, damping)
    if not rounds:
        return known.pack(blocks).reshape(len(weight), -1), damping
    best = blocks
    difference = difference_of(matrix, known, blocks)
    product = difference @ damped_inputs  # renewed by each step; three quarters of the work else
    least = _cost(difference, product, damped_outputs)
    for _ in range(rounds):
        blocks = refit_scales(matrix, known, blocks, damped_inputs, damped_outputs, product)
        blocks = descend_codes(matrix, known, blocks, damped_inputs, damped_outputs, product)
        value = _cost(difference_of(matrix, known, blocks), product, damped_outputs)
        if value < least:
            best = blocks
            least = value
    return known.pack(best).reshape(len(weight), -1), damping
