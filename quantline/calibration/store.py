"""The statistics on disk: written one decoder block at a time, read one layer at a time."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from quantline.calibration import packing
from quantline.calibration.expert_coverage import coverage_figures
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_tensors

INFO = "calibration.json"
INPUTS = "inputs"  # second moments of the layers' inputs
OUTPUTS = "outputs"  # second moments of the gradients at the layers' outputs
# Of the mean diagonal of second moments that methods compute with.
SMALLEST = 1e-30
LARGEST = 1e20
Problem = Literal["zero", "not finite"]
# What is said of a layer whose moments are of no use, by their kind.
PROBLEMS: dict[tuple[str, str], str] = {
    (INPUTS, "zero"): "no input reached it",
    (INPUTS, "not finite"): "its inputs are not finite",
    (OUTPUTS, "zero"): "no gradient reached it",
    (OUTPUTS, "not finite"): "the gradients at its outputs are not finite",
}


def block_file(kind: str, block: int) -> str:
    """Return the file of a block's `inputs` or `outputs`."""
    return f"{kind}-{block:03d}.safetensors"


def problem_of(diagonal: np.ndarray) -> Problem | None:
    """Return why second moments are of no use, from their diagonal; None if they are.

    Beyond SMALLEST and LARGEST single precision cannot compute with them.
    """
    if not np.isfinite(diagonal).all():
        return "not finite"
    mean = diagonal.mean(dtype=np.float64)
    if not mean >= SMALLEST:
        return "zero"
    return None if mean <= LARGEST else "not finite"


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

        Moments that are not finite are stored as NaN: one layer does not stop the others.
        """
        if np.isfinite(moments).all():
            diagonal, triangle = packing.pack(moments)
        else:
            diagonal, triangle = packing.pack(np.zeros_like(moments))
            diagonal = np.full_like(diagonal, np.nan)
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
        # H that was read last: unpacking a wide one costs as much as rounding a narrow layer, and
        # every step of a method asks for it.
        self._last_read: tuple[str, np.ndarray] | None = None

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
            calibrated on all tokens, because too few reached it, and {not_finite: how many} tokens
            whose inputs do not count.
        """
        entry = self.info["layers"].get(layer, {"tokens": 0})
        return {key: entry[key] for key in ("tokens", "starved", "not_finite") if key in entry}

    def problems(self, layer: str, gradients: bool) -> list[str]:
        """Return why statistics of a layer are of no use, so that methods get others.

        In place of its second moments they get the identity, times what is usual in the model: as
        if all inputs, or outputs, mattered alike.

        Args:
            layer: The module's name.
            gradients: Whether the method looks at output gradients too.
        """
        if layer not in self.info["layers"]:
            return []
        kinds = [(INPUTS, self.info["layers"][layer]["moments"])]
        if gradients and self.has_gradients:
            kinds.append((OUTPUTS, layer))
        found = []
        for kind, key in kinds:
            problem = problem_of(self._read_part(layer, kind, key, "diagonal"))
            if problem:
                found.append(PROBLEMS[kind, problem])
        return found

    def usual_level(self, kind: str) -> float:
        """Return the median over the layers of the mean diagonal; 1 if none is of use."""
        return _usual_level(self, kind)

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
        """Return H = XᵀX / n of the layer's inputs, float32 [in, in] (see `problems`).

        Callers share it, and leave it as it is.

        Raises:
            StageError: calibration_empty, if the layer saw nothing.
        """
        self._check_coverage(layer)
        key = self.info["layers"][layer]["moments"]
        if self._last_read is None or self._last_read[0] != key:
            self._last_read = None  # before the next one takes memory
            self._last_read = (key, self._read_moments(layer, INPUTS, key))
        return self._last_read[1]

    def hessian_diagonal(self, layer: str) -> np.ndarray:
        """Return the diagonal of H, float32 [in], without reading the rest.

        Raises:
            StageError: As `hessian` does.
        """
        self._check_coverage(layer)
        diagonal = self._read_input_part(layer, "diagonal")
        if problem_of(diagonal):
            return np.full_like(diagonal, self.usual_level(INPUTS))
        return diagonal

    def input_peak(self, layer: str) -> np.ndarray:
        """Return the largest |x| of each of the layer's inputs, float32 [in] (see `problems`)."""
        peak = self._read_input_part(layer, "peak")
        return np.ones_like(peak) if self.problems(layer, gradients=False) else peak

    def input_sample(self, layer: str) -> np.ndarray:
        """Return the layer's inputs at some tokens, float32 [tokens, in] (see `problems`)."""
        shares = self._read_input_part(layer, "sample").astype(np.float32)
        if self.problems(layer, gradients=False):
            return np.zeros_like(shares)
        return shares * self.input_peak(layer)

    def _read_input_part(self, layer: str, part: str) -> np.ndarray:
        return self._read_part(layer, INPUTS, self.info["layers"][layer]["moments"], part)

    def _read_part(self, layer: str, kind: str, key: str, part: str) -> np.ndarray:
        block = self.info["layers"][layer]["block"]
        with safe_open(self.folder / block_file(kind, block), "np") as file:
            return file.get_tensor(f"{key}.{part}")

    def fisher_out(self, layer: str) -> np.ndarray:
        """Return G, the diagonal blocks of the second moments of the output gradient.

        Returns:
            float32 [blocks, size, size].

        Raises:
            StageError: calibration_empty, if gradients were not collected.
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
            if problem_of(diagonal):
                identity = np.zeros((*diagonal.shape, diagonal.shape[-1]), np.float32)
                index = np.arange(diagonal.shape[-1])
                identity[..., index, index] = self.usual_level(kind)
                return identity
            triangle = file.get_tensor(f"{key}.triangle")
        return packing.unpack(diagonal, triangle)

    def expert_figures(self) -> dict[str, int] | None:
        """Return how well the experts are covered (see `coverage_figures`); None without any."""
        return coverage_figures(self.info.get("experts", []))

    def provenance(self) -> dict[str, Any]:
        """Return what a manifest says of the calibration."""
        return {key: self.info[key] for key in ("text_sha256", "tokens", "seed")}


@cache
def _usual_level(store: CalibrationStore, kind: str) -> float:
    levels = []
    for layer, entry in store.info["layers"].items():
        key = entry["moments"] if kind == INPUTS else layer
        if key != layer:
            continue
        diagonal = store._read_part(layer, kind, key, "diagonal")
        if problem_of(diagonal) is None:
            levels.append(float(diagonal.mean(dtype=np.float64)))
    return float(np.median(levels)) if levels else 1.0
