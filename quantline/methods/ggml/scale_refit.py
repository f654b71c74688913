"""Moving the scales, minima, d and dmin of ggml's blocks to where tr(G Δ H Δᵀ) is less.

The codes stay. A coordinate descent over what the format can store: of one row and one block, d and
dmin together; of one row and one sub-block, the integer scale and minimum together.
"""

from dataclasses import dataclass

import numpy as np
import torch

from quantline.methods.ggml.blocks import Blocks, BlockType
from quantline.methods.ggml.scale_moves import LARGEST_FLOAT16, Range, move_rows
from quantline.methods.threads import in_threads

SPAN_COLUMNS = 128  # whose changes are gathered before Δ H of all columns is renewed
FLOAT16_RANGE = (np.float32(-LARGEST_FLOAT16), np.float32(LARGEST_FLOAT16))


def _move(
    first: np.ndarray,
    second: np.ndarray | None,
    hessian: torch.Tensor,
    gradient: torch.Tensor,
    fisher: torch.Tensor,
    p: np.ndarray,
    q: np.ndarray,
    is_integer: bool,
    p_range: Range,
    q_range: Range,
) -> torch.Tensor:
    """Call `move_rows` with the products with H, and leave the gradient as it is.

    Without a second direction there is no q.
    """
    first_product = (torch.from_numpy(first) @ hessian).numpy()
    if second is None:
        second = second_product = np.zeros_like(first)
    else:
        second_product = (torch.from_numpy(second) @ hessian).numpy()
    change = move_rows(
        first,
        second,
        first_product,
        second_product,
        p,
        q,
        is_integer,
        p_range,
        q_range,
        gradient.clone(memory_format=torch.contiguous_format).numpy(),
        fisher.numpy(),
    )
    return torch.from_numpy(change)


@dataclass(frozen=True)
class _Fields:
    """The fields of some rows' blocks as float32, block by block, which change in place.

    Attributes:
        levels: What the codes stand for [blocks, rows, block size].
        scales: [blocks, rows, sub-blocks].
        minima: [blocks, rows, sub-blocks].
        d: [blocks, rows, 1].
        dmin: [blocks, rows, 1].
    """

    levels: np.ndarray
    scales: np.ndarray
    minima: np.ndarray
    d: np.ndarray
    dmin: np.ndarray

    @classmethod
    def of(cls, block_type: BlockType, blocks: Blocks, rows: int) -> "_Fields":
        """Convert the blocks of a weight with so many rows."""

        def by_block(values: np.ndarray) -> np.ndarray:
            whole = values.reshape(rows, len(blocks.codes) // rows, -1).swapaxes(0, 1)
            return np.ascontiguousarray(whole, np.float32)

        return cls(
            by_block(block_type.levels[blocks.codes]),
            by_block(blocks.scales),
            by_block(blocks.minima),
            by_block(blocks.d),
            by_block(blocks.dmin),
        )

    def rows(self, rows: slice) -> "_Fields":
        """Return views of some rows."""
        return _Fields(
            self.levels[:, rows],
            self.scales[:, rows],
            self.minima[:, rows],
            self.d[:, rows],
            self.dmin[:, rows],
        )

    def stored(self, old: Blocks) -> Blocks:
        """Return the blocks with these fields in place of their old ones."""

        def as_stored(values: np.ndarray, field: np.ndarray) -> np.ndarray:
            return values.swapaxes(0, 1).astype(field.dtype).reshape(field.shape)

        return Blocks(
            old.codes,
            as_stored(self.scales, old.scales),
            as_stored(self.minima, old.minima),
            as_stored(self.d, old.d),
            as_stored(self.dmin, old.dmin),
        )


class _RowDescent:
    """Moves the fields of the rows of one diagonal block of G."""

    def __init__(
        self, block_type: BlockType, fields: _Fields, hessian: torch.Tensor, fisher: torch.Tensor
    ) -> None:
        """Take what stays the same.

        Args:
            block_type: The blocks' type.
            fields: Of these rows.
            hessian: H [in, in].
            fisher: G of these rows [rows, rows].
        """
        self.block_type = block_type
        self.fields = fields
        self.hessian = hessian
        self.fisher = fisher
        self.scale_range = FLOAT16_RANGE
        if block_type.scale_range is not None:
            least, most = block_type.scale_range
            self.scale_range = (np.float32(least), np.float32(most))
        self.minimum_range = (np.float32(0), np.float32(block_type.largest_minimum or 0))

    def run(self, product: torch.Tensor) -> None:
        """Move all fields once, from Δ H [rows, in], which is changed to that of the new fields."""
        size = self.block_type.block_size
        width = product.shape[1]
        for first in range(0, width, max(size, SPAN_COLUMNS)):
            span = slice(first, min(width, first + max(size, SPAN_COLUMNS)))
            within = product[:, span].clone()  # as it becomes while blocks of the span move
            changes = torch.empty_like(within)
            for start in range(0, within.shape[1], size):
                columns = slice(start, start + size)
                of_span = slice(first + start, first + start + size)
                gradient = self.fisher @ within[:, columns]
                change = self._move_block(
                    of_span.start // size, self.hessian[of_span, of_span], gradient
                )
                changes[:, columns] = change
                if columns.stop < within.shape[1]:
                    after = slice(of_span.stop, span.stop)
                    within[:, columns.stop :] += change @ self.hessian[of_span, after]
            product.addmm_(changes, self.hessian[span])

    def _move_block(
        self, block: int, hessian: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Move d and dmin of one block of each row, then the fields of its sub-blocks.

        Args:
            block: The block's number in a row.
            hessian: H of its columns.
            gradient: G Δ H of its columns [rows, block size].

        Returns:
            The change of the rounded weight [rows, block size].
        """
        fields = self.fields
        sub = self.block_type.sub_block_size
        by_minimum = None
        if self.block_type.largest_minimum is not None:
            by_minimum = -fields.minima[block].repeat(sub, 1)
        change = _move(
            fields.scales[block].repeat(sub, 1) * fields.levels[block],
            by_minimum,
            hessian,
            gradient,
            self.fisher,
            fields.d[block, :, 0],
            fields.dmin[block, :, 0],
            False,
            FLOAT16_RANGE,
            FLOAT16_RANGE,
        )
        if self.block_type.scale_range is None:
            return change
        gradient = gradient + self.fisher @ change @ hessian
        for sub_block in range(self.block_type.block_size // sub):
            columns = slice(sub_block * sub, (sub_block + 1) * sub)
            sub_change = self._move_sub_block(
                block, sub_block, hessian[columns, columns], gradient[:, columns]
            )
            change[:, columns] += sub_change
            after = slice(columns.stop, None)  # those before have moved
            gradient[:, after] += self.fisher @ sub_change @ hessian[columns, after]
        return change

    def _move_sub_block(
        self, block: int, sub_block: int, hessian: torch.Tensor, gradient: torch.Tensor
    ) -> torch.Tensor:
        """Move the integer scale and minimum of one sub-block of each row, as `_move_block`."""
        fields = self.fields
        sub = self.block_type.sub_block_size
        columns = slice(sub_block * sub, (sub_block + 1) * sub)
        by_scale = fields.d[block] * fields.levels[block, :, columns]
        by_minimum = None
        if self.block_type.largest_minimum:
            by_minimum = np.repeat(-fields.dmin[block], sub, 1)
        return _move(
            by_scale,
            by_minimum,
            hessian,
            gradient,
            self.fisher,
            fields.scales[block, :, sub_block],
            fields.minima[block, :, sub_block],
            True,
            self.scale_range,
            self.minimum_range,
        )


def difference_of(weight: torch.Tensor, block_type: BlockType, blocks: Blocks) -> torch.Tensor:
    """Return Δ, what blocks stand for less the weight, float32 [out, in]."""
    return torch.from_numpy(block_type.dequantize(blocks)).reshape(weight.shape) - weight


def refit_scales(
    weight: torch.Tensor,
    block_type: BlockType,
    blocks: Blocks,
    hessian: torch.Tensor,
    fisher_out: torch.Tensor,
    product: torch.Tensor | None = None,
) -> Blocks:
    """Move scales, minima, d and dmin in one pass; the codes stay.

    Rows of different blocks of G do not depend on each other and are moved in threads; the result
    does not depend on their number.

    Args:
        weight: float32 [out, in].
        block_type: The blocks' type.
        blocks: Those of the weight, row by row.
        hessian: H [in, in].
        fisher_out: G in diagonal blocks [blocks, n, n].
        product: Δ H [out, in], if it is known; it is changed to that of the new blocks.

    Returns:
        The blocks with the new scales, minima, d and dmin.
    """
    fields = _Fields.of(block_type, blocks, len(weight))
    if product is None:
        product = difference_of(weight, block_type, blocks) @ hessian
    rows_of_block = len(weight) // len(fisher_out)

    def run(number: int) -> None:
        rows = slice(number * rows_of_block, (number + 1) * rows_of_block)
        fisher = fisher_out[number].contiguous()
        _RowDescent(block_type, fields.rows(rows), hessian, fisher).run(product[rows])

    in_threads(range(len(fisher_out)), run)
    return fields.stored(blocks)
