"""The statistics on disk: written one decoder block at a time, read one layer at a time."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from quantline.calibration import packing
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_tensors

INFO = "calibration.json"
INPUTS = "inputs"  # second moments of the layers' inputs
OUTPUTS = "outputs"  # second moments of the gradients at the layers' outputs


def block_file(kind: str, block: int) -> str:
    """Return the file of a block's `inputs` or `outputs`."""
    return f"{kind}-{block:03d}.safetensors"


def check_moments(layer: str, moments: np.ndarray) -> None:
    """Check second moments [..., n, n].

    Raises:
        StageError: non_finite; calibration_empty, if the inputs or gradients were all zero.
    """
    if not np.isfinite(moments).all():
        raise StageError(
            Failure.NON_FINITE,
            f"expected finite inputs and gradients of {layer}, found NaN or infinity in their "
            "second moments; the model overflows on the calibration text",
        )
    if not np.diagonal(moments, axis1=-2, axis2=-1).sum() > 0:
        raise StageError(
            Failure.CALIBRATION_EMPTY,
            f"expected inputs and gradients of {layer} that are not all zero; look at the "
            "calibration text and at the layer before",
        )


class BlockWriter:
    """Collects the statistics of one block at a time; a block's file that exists is complete."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Write files of a kind, INPUTS or OUTPUTS, into a folder."""
        self.folder = folder
        self.kind = kind
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, layer: str, moments: np.ndarray, **more: np.ndarray) -> None:
        """Add the second moments of a layer of the present block.

        Args:
            layer: The module's name.
            moments: float32 [..., n, n].
            more: Other tensors of the layer, stored as they are.

        Raises:
            StageError: As `check_moments` does.
        """
        check_moments(layer, moments)
        diagonal, triangle = packing.pack(moments)
        for part, values in (more | {"diagonal": diagonal, "triangle": triangle}).items():
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


class CalibrationStore:
    """Reads artifacts/calibration.

    Attributes:
        info: The content of calibration.json.
        layers: The calibrated linear layers, sorted.
    """

    def __init__(self, folder: Path | str) -> None:
        """Read calibration.json."""
        self.folder = Path(folder)
        self.info = read_json(self.folder / INFO)
        self.layers = sorted(self.info["layers"])

    @property
    def has_gradients(self) -> bool:
        """Whether output gradients were collected."""
        return bool(self.info["curvature"])

    def tokens(self, layer: str) -> int:
        """Return how many tokens the layer saw."""
        return self.info["layers"][layer]["tokens"]

    def coverage(self, layer: str) -> dict[str, Any]:
        """Return what a report says of a layer's calibration.

        Returns:
            {tokens: how many the layer saw}, with {starved: True} for an expert that was
            calibrated on all tokens, because too few reached it.
        """
        entry = self.info["layers"].get(layer, {"tokens": 0})
        return {key: entry[key] for key in ("tokens", "starved") if key in entry}

    def input_key(self, layer: str) -> str | None:
        """Return what layers that read one input have in common; None for other layers."""
        return self.info["layers"].get(layer, {}).get("moments")

    def _check_coverage(self, layer: str) -> None:
        coverage = self.coverage(layer)
        if not (coverage["tokens"] > 0 or coverage.get("starved")):
            raise StageError(
                Failure.CALIBRATION_EMPTY,
                f"{layer} saw no calibration tokens; run calibrate again",
            )

    def hessian(self, layer: str) -> np.ndarray:
        """Return H = XᵀX / n of the layer's inputs, float32 [in, in].

        Raises:
            StageError: calibration_empty, if the layer saw nothing; non_finite.
        """
        self._check_coverage(layer)
        return self._read_moments(layer, INPUTS, self.info["layers"][layer]["moments"])

    def hessian_diagonal(self, layer: str) -> np.ndarray:
        """Return the diagonal of H, float32 [in], without reading the rest.

        Raises:
            StageError: As `hessian` does.
        """
        self._check_coverage(layer)
        diagonal = self._read_input_part(layer, "diagonal")
        check_moments(layer, diagonal[:, None, None])
        return diagonal

    def input_peak(self, layer: str) -> np.ndarray:
        """Return the largest |x| of each of the layer's inputs, float32 [in]."""
        return self._read_input_part(layer, "peak")

    def input_sample(self, layer: str) -> np.ndarray:
        """Return the layer's inputs at some tokens, float32 [tokens, in]."""
        shares = self._read_input_part(layer, "sample").astype(np.float32)
        return shares * self.input_peak(layer)

    def _read_input_part(self, layer: str, part: str) -> np.ndarray:
        entry = self.info["layers"][layer]
        with safe_open(self.folder / block_file(INPUTS, entry["block"]), "np") as file:
            return file.get_tensor(f"{entry['moments']}.{part}")

    def fisher_out(self, layer: str) -> np.ndarray:
        """Return G, the diagonal blocks of the second moments of the output gradient.

        Returns:
            float32 [blocks, size, size].

        Raises:
            StageError: calibration_empty, if gradients were not collected; non_finite.
        """
        if not self.has_gradients:
            raise StageError(
                Failure.CALIBRATION_EMPTY,
                "expected a calibration with gradients, which curvature rounding needs, found one "
                "without; set calibration.curvature=true",
            )
        return self._read_moments(layer, OUTPUTS, layer)

    def output_importance(self, layer: str) -> np.ndarray:
        """Return the diagonal of G, float32 [out]. Raises as `fisher_out` does."""
        diagonal = np.diagonal(self.fisher_out(layer), axis1=-2, axis2=-1)
        return np.ascontiguousarray(diagonal).reshape(-1)

    def _read_moments(self, layer: str, kind: str, key: str) -> np.ndarray:
        block = self.info["layers"][layer]["block"]
        with safe_open(self.folder / block_file(kind, block), "np") as file:
            diagonal = file.get_tensor(f"{key}.diagonal")
            triangle = file.get_tensor(f"{key}.triangle")
        moments = packing.unpack(diagonal, triangle)
        check_moments(layer, moments)
        return moments

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest says of the calibration."""
        return {key: self.info[key] for key in ("text_sha256", "tokens", "seed")}
