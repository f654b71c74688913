"""The sizes of a model, from the headers of its files alone."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from quantline.config.params import Params
from quantline.files import read_json
from quantline.paths import MODEL

IN_BLOCK = re.compile(r"^(.*?)\.(\d+)\.")  # of a tensor's name: the list of blocks, and the block
Shape = tuple[int, ...]


class ModelSizes(NamedTuple):
    """What the needs of a run follow from.

    Attributes:
        parameters: All of them.
        file_bytes: Of the files with weights.
        blocks: The number of decoder blocks.
        block_weights: Weights of matrices in the largest block.
        matrices: Shape [rows, columns] of each matrix in all blocks; an expert is one.
        vocabulary: Rows of the embedding.
        hidden: Its columns.
    """

    parameters: int
    file_bytes: int
    blocks: int
    block_weights: int
    matrices: list[tuple[int, int]]
    vocabulary: int
    hidden: int

    @property
    def weights(self) -> int:
        """Weights of all matrices in blocks, which recipes round."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.vocabulary * self.hidden


def sizes_of_project(params: Params, root: Path) -> ModelSizes | None:
    """Return the sizes of the project's model; None where its files are not here yet."""
    model = params.model
    if model.source != "hub":
        return sizes_of(root / str(model.path))
    loaded = root / MODEL
    manifest = loaded / "manifest.json"
    if not manifest.is_file() or read_json(manifest)["source"].get("id") != model.id:
        return None
    return sizes_of(loaded)


def sizes_of(path: Path) -> ModelSizes | None:
    """Return the sizes of a model.

    Args:
        path: A folder with safetensors, or a GGUF file.

    Returns:
        None if it has no decoder blocks with matrices that can be told.
    """
    if path.is_file():
        return sizes_from(_gguf_shapes(path), path.stat().st_size)
    files = sorted(path.glob("*.safetensors"))
    shapes: dict[str, Shape] = {}
    for file in files:
        shapes |= _safetensors_shapes(file)
    return sizes_from(shapes.items(), sum(file.stat().st_size for file in files))


def sizes_from(shapes: Iterable[tuple[str, Shape]], file_bytes: int) -> ModelSizes | None:
    """Return the sizes that follow from the tensors' names and shapes."""
    parameters = 0
    blocks: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    outside: list[Shape] = []
    for name, shape in shapes:
        parameters += int(np.prod(shape))
        found = IN_BLOCK.match(name)
        if len(shape) < 2:
            continue
        if found is None:
            outside.append(shape)
            continue
        of_block = blocks[found[1]][int(found[2])]
        of_block += [(shape[-2], shape[-1])] * int(np.prod(shape[:-2]))
    if not blocks or not outside:
        return None
    # Of a model that reads images too, the text's blocks are those with the most weights.
    lists = [list(one.values()) for one in blocks.values()]
    weights = [[sum(rows * columns for rows, columns in block) for block in one] for one in lists]
    largest = max(range(len(lists)), key=lambda index: sum(weights[index]))
    vocabulary, hidden = max(sorted(shape[-2:], reverse=True) for shape in outside)
    return ModelSizes(
        parameters,
        file_bytes,
        len(lists[largest]),
        max(weights[largest]),
        [matrix for block in lists[largest] for matrix in block],
        vocabulary,
        hidden,
    )


def _safetensors_shapes(path: Path) -> dict[str, Shape]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _gguf_shapes(path: Path) -> list[tuple[str, Shape]]:
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    return [(one.name, tuple(int(size) for size in reversed(one.shape))) for one in tensors]
