"""Writing the codes of a quantized source beside the plain tensors that they stand for."""

from pathlib import Path

import numpy as np

from quantline.model.safetensors_writer import SafetensorsWriter
from quantline.quantized.source_codes import FILE, GROUPED_PARTS, blocks_key, grouped_key
from quantline.quantized.tensors import GroupedLinear

LONGEST = "int4-g16384-asymmetric//integers"  # of a key, besides the name


class CodesWriter(SafetensorsWriter):
    """A context manager that writes codes one tensor after another, if there are any."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        """Open nothing yet.

        Args:
            folder: Of the model.
            names: Tensors whose codes may be added.
        """
        super().__init__(folder / FILE, [name + LONGEST for name in names for _ in GROUPED_PARTS])

    def add_blocks(self, name: str, ggml_type: str, data: np.ndarray) -> None:
        """Add ggml's blocks of a tensor, uint8 [rows, bytes per row]."""
        self.add(blocks_key(name, ggml_type), data)

    def add_grouped(self, layer: str, linear: GroupedLinear) -> None:
        """Add the integers of a layer."""
        for part, values in linear.parts().items():
            self.add(grouped_key(layer, linear, part), values)

    def __exit__(self, kind: type[BaseException] | None, *problem: object) -> None:
        super().__exit__(kind, *problem)
        if not self.end:
            self.path.unlink()
