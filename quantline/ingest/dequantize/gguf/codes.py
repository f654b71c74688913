"""Which blocks of a GGUF file can be handed on as they are.

A tensor whose rows were only put into another order has the same blocks, in that order. Whether
that is so is tried: the blocks go the way of the values, and have to stand for them in the end.
"""

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.ingest.dequantize.gguf.file import GgufFile
from quantline.ingest.dequantize.gguf.tensors import Block, Mapper, stored_names

TRIED_ROWS = 256


def kept_codes(
    file: GgufFile, model: Any, parameters_of: Mapper, block: Block
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name in the checkpoint, type, uint8 [rows, bytes per row]) of blocks that are kept.

    Args:
        file: The file.
        model: transformers' model on the meta device.
        parameters_of: What `mapper` returned.
        block: What the values became.
    """
    for name in block.names:
        if not file.is_quantized(name):
            continue
        try:
            made = stored_names(model, parameters_of([name], file.blocks))
        except Exception as error:  # not a way that bytes can go
            raise_if_of_machine(error)
            continue
        for target, data in made.items():
            values = block.stored.get(target)
            if values is not None and _stands_for(data, file, name, values):
                yield target, file.type_of(name), data


def _stands_for(data: np.ndarray, file: GgufFile, name: str, values: np.ndarray) -> bool:
    """Whether blocks stand for values, on rows that are spread evenly."""
    if data.dtype != np.uint8 or data.ndim != 2 or len(data) != len(values):
        return False
    rows = np.unique(np.linspace(0, len(data) - 1, TRIED_ROWS).round().astype(int))
    try:
        tried = gguf.quants.dequantize(data[rows], file.tensors[name].tensor_type)
    except ValueError:  # bytes that are no whole blocks
        return False
    return np.array_equal(tried, values[rows])
