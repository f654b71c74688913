"""The block types of ggml that quantline can unpack, and what blocks of any type stand for."""

from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, quants

from quantline.methods.ggml.blocks import BlockType
from quantline.methods.ggml.blocks_of_32 import TYPES_OF_32
from quantline.methods.ggml.blocks_of_256 import TYPES_OF_256

BLOCK_TYPES = {block_type.name: block_type for block_type in (*TYPES_OF_32, *TYPES_OF_256)}


class PlainGrid(NamedTuple):
    """A grid of plain integers: one scale and one zero point for each group of weights."""

    bits: int
    group_size: int
    symmetric: bool


def block_type(name: str) -> BlockType:
    """Return the type of that name. Raises KeyError for one without a codec, such as F16."""
    return BLOCK_TYPES[name]


def dequantize_blocks(data: np.ndarray, ggml_type: str) -> np.ndarray:
    """Return the weights that ggml's blocks stand for.

    Args:
        data: uint8 [rows, bytes per row].
        ggml_type: Any of ggml's types, also one that has no codec here.

    Returns:
        float32 [rows, width].
    """
    known = BLOCK_TYPES.get(ggml_type)
    if known is None:
        return quants.dequantize(data, GGMLQuantizationType[ggml_type])
    blocks = known.unpack(data.reshape(-1, known.block_bytes))
    return known.dequantize(blocks).reshape(len(data), -1)


def plain_grid_of(ggml_type: str) -> PlainGrid | None:
    """Return the plain grid that a type refines; None for a type of a codebook or of floats."""
    known = BLOCK_TYPES.get(ggml_type)
    if known is None or not known.is_uniform:
        return None
    bits = int(known.levels.size).bit_length() - 1
    return PlainGrid(bits, known.sub_block_size, known.largest_minimum is None)
