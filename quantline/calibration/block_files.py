"""The files of a calibration: one for each decoder block and kind of statistics."""

from pathlib import Path

import numpy as np

from quantline.calibration import packing
from quantline.files import write_tensors

INPUTS = "inputs"  # second moments of the layers' inputs, and more about them
WEIGHTED = "weighted"  # the same moments with each token counted by its gradient
OUTPUTS = "outputs"  # second moments of the gradients at the layers' outputs


def block_file(kind: str, block: int) -> str:
    """Return the file of a block's statistics of a kind."""
    return f"{kind}-{block:03d}.safetensors"


class BlockWriter:
    """Collects the statistics of one block at a time; a block's file that exists is complete."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Write files of a kind, INPUTS, WEIGHTED or OUTPUTS, into a folder."""
        self.folder = folder
        self.kind = kind
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, layer: str, moments: np.ndarray | None, **more: np.ndarray) -> None:
        """Add the second moments of a layer of the present block.

        Args:
            layer: The module's name.
            moments: float32 [..., n, n]; None where they are in a file of another kind.
            more: Other tensors of the layer, stored as they are.

        Moments that are not finite are stored as NaN: one layer does not stop the others.
        """
        if moments is not None:
            if np.isfinite(moments).all():
                diagonal, triangle = packing.pack(moments)
            else:
                diagonal, triangle = packing.pack(np.zeros_like(moments))
                diagonal = np.full_like(diagonal, np.nan)
            more |= {"diagonal": diagonal, "triangle": triangle}
        for part, values in more.items():
            self.tensors[f"{layer}.{part}"] = values

    def close(self, block: int) -> None:
        """Write the block's file under a temporary name, and rename it."""
        temporary = self.folder / ".part"
        write_tensors(temporary, dict(sorted(self.tensors.items())))
        temporary.rename(self.folder / block_file(self.kind, block))
        self.tensors = {}

    def has(self, block: int) -> bool:
        """Whether the block's file is there."""
        return (self.folder / block_file(self.kind, block)).is_file()
