"""Safetensors files that a test writes or changes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsWriter

# change(name, tensor) returns the tensor to write instead, or None to leave it out.
Change = Callable[[str, np.ndarray], np.ndarray | None]


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a safetensors file anew; a link of that name is replaced and its source left alone."""
    path.unlink(missing_ok=True)
    with SafetensorsWriter(path, list(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a checkpoint, in the dtypes that they are stored in."""
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.raw(name).copy() for name in checkpoint.names}


def change_tensors(folder: Path, change: Change) -> None:
    """Write the weights of a checkpoint of one file again."""
    changed = {}
    for name, tensor in read_tensors(folder).items():
        new = change(name, tensor)
        if new is not None:
            changed[name] = new
    write_tensors(folder / "model.safetensors", changed)


def edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
