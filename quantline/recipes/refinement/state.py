"""What a killed refinement is continued from: one folder, in which a finished step is whole.

A step reads what the step before it wrote, and writes files of its own beside them. progress.json
counts the steps; what it does not count yet is written again.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from quantline.files import read_json, write_json, write_tensors
from quantline.model.device import device
from quantline.recipes.refinement.leftovers import FOLDER
from quantline.recipes.refinement.moves import Moved

PROGRESS = "progress.json"
EXPECTED = "expected"  # final hidden states of the unquantized model


class RefinementState:
    """The folder of a refinement.

    Attributes:
        known: The content of progress.json: `steps` that are finished, and what was found.
    """

    def __init__(self, folder: Path) -> None:
        """Open or make the folder.

        Args:
            folder: Of the result.
        """
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        path = self.folder / PROGRESS
        self.known: dict[str, Any] = read_json(path) if path.is_file() else {"steps": 0}

    @property
    def steps(self) -> int:
        """The number of steps that are finished."""
        return self.known["steps"]

    def note(self, **found: Any) -> None:
        """Write down what was found, or how many steps are finished."""
        self.known |= found
        write_json(self.folder / PROGRESS, self.known)

    def _path(self, part: str, step: int) -> Path:
        return self.folder / f"{part}-{step % 2}.safetensors"

    def read(self, part: str) -> dict[str, Moved]:
        """Return what the last finished step left of a part: what moves → how far it is."""
        path = self._path(part, self.steps)
        if not path.is_file():
            return {}
        values = load_file(path)
        names = sorted({key.rpartition("|")[0] for key in values})
        return {
            name: Moved(*(_on_device(values[f"{name}|{kind}"]) for kind in Moved._fields))
            for name in names
        }

    def change(self, part: str, name: str) -> torch.Tensor | None:
        """Return how far a single tensor has moved; None for one that has not."""
        path = self._path(part, self.steps)
        if not path.is_file():
            return None
        key = f"{name}|change"
        with safe_open(path, "np") as file:
            return _on_device(file.get_tensor(key)) if key in file.keys() else None  # noqa: SIM118

    def write(self, part: str, moved: Mapping[str, Moved]) -> None:
        """Write what the step in work has made of a part."""
        tensors = {
            f"{name}|{kind}": values.cpu().numpy()
            for name, of in moved.items()
            for kind, values in of._asdict().items()
        }
        write_tensors(self._path(part, self.steps + 1), tensors)

    def keep_result(self, part: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Write what shall stand in the place of a part's tensors."""
        write_tensors(self.folder / f"{part}-result.safetensors", tensors)

    def result(self, part: str) -> dict[str, np.ndarray]:
        """Return what `keep_result` wrote."""
        return load_file(self.folder / f"{part}-result.safetensors")


def _on_device(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(device())
