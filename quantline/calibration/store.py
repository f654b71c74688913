"""The statistics on disk: written one decoder block at a time, read one layer at a time."""

from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from quantline.calibration import packing
from quantline.calibration.block_files import INPUTS, OUTPUTS, WEIGHTED, block_file
from quantline.calibration.expert_coverage import coverage_figures
from quantline.errors import Failure, StageError
from quantline.files import read_json

INFO = "calibration.json"
# Of the mean diagonal of second moments that methods compute with.
SMALLEST = 1e-30
LARGEST = 1e20
Problem = Literal["zero", "not finite"]
# What is said of a layer whose moments are of no use, by their kind.
PROBLEMS: dict[tuple[str, str], str] = {
    (INPUTS, "zero"): "no input reached it",
    (INPUTS, "not finite"): "its inputs are not finite",
    (WEIGHTED, "zero"): "no gradient reached it",  # unless its inputs are zero themselves
    (WEIGHTED, "not finite"): "its inputs are not finite",
    (OUTPUTS, "zero"): "no gradient reached it",
    (OUTPUTS, "not finite"): "the gradients at its outputs are not finite",
}


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


def shrink_to_diagonal(moments: np.ndarray, share: float) -> np.ndarray:
    """Take a share off the off-diagonal entries, in place.

    Args:
        moments: float32 [n, n].
        share: 0 to 1.

    Returns:
        The matrix, which is positive semidefinite if it was: a mean of itself and its diagonal.
    """
    if share:
        diagonal = moments.diagonal().copy()
        moments *= np.float32(1 - share)
        np.fill_diagonal(moments, diagonal)
    return moments


def effective_tokens(folder: Path, layers: dict[str, dict[str, Any]]) -> dict[str, int] | None:
    """Return how many tokens that count alike would be as many as those counted by gradients.

    Args:
        folder: Of a calibration with weighted moments.
        layers: What calibration.json says of each layer.

    Returns:
        {fewest: of all inputs, median}, (Σ w)² / Σ w² each; None without layers.
    """
    counts = []
    for layer, entry in sorted(layers.items()):
        if entry["moments"] == layer:
            with safe_open(folder / block_file(WEIGHTED, entry["block"]), "np") as file:
                counts.append(float(file.get_tensor(f"{layer}.effective_tokens")[0]))
    if not counts:
        return None
    return {"fewest": round(min(counts)), "median": round(float(np.median(counts)))}


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
        self._last_read: tuple[tuple[str, float], np.ndarray] | None = None

    @property
    def has_gradients(self) -> bool:
        """Whether output gradients were collected."""
        return bool(self.info["curvature"])

    @property
    def moments_kind(self) -> str:
        """The kind of file that has the second moments of the inputs."""
        return WEIGHTED if self.info.get("weights") == "gradient" else INPUTS

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
        kinds = [(self.moments_kind, self._moments_key(layer))]
        if gradients and self.has_gradients:
            kinds.append((OUTPUTS, layer))
        found = []
        for kind, key in kinds:
            problem = problem_of(self._read_part(layer, kind, key, "diagonal"))
            if not problem:
                continue
            dead = kind == WEIGHTED and not self._read_input_part(layer, "peak").any()
            found.append(PROBLEMS[INPUTS if dead else kind, problem])
        return list(dict.fromkeys(found))  # a gradient that is lacking is so on both sides

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

    def hessian(self, layer: str, shrinkage: float = 0.0) -> np.ndarray:
        """Return H, the second moments of the layer's inputs, float32 [in, in] (see `problems`).

        It is XᵀX / n, or with each token counted by its gradient (weighted_moments.py).

        Callers share it, and leave it as it is.

        Args:
            layer: The module's name.
            shrinkage: As for `shrink_to_diagonal`.

        Raises:
            StageError: calibration_empty, if the layer saw nothing.
        """
        self._check_coverage(layer)
        key = self._moments_key(layer)
        if self._last_read is None or self._last_read[0] != (key, shrinkage):
            self._last_read = None  # before the next one takes memory
            moments = self._read_moments(layer, self.moments_kind, key)
            self._last_read = ((key, shrinkage), shrink_to_diagonal(moments, shrinkage))
        return self._last_read[1]

    def hessian_diagonal(self, layer: str) -> np.ndarray:
        """Return the diagonal of H, float32 [in], without reading the rest.

        Raises:
            StageError: As `hessian` does.
        """
        self._check_coverage(layer)
        kind = self.moments_kind
        diagonal = self._read_part(layer, kind, self._moments_key(layer), "diagonal")
        if problem_of(diagonal):
            return np.full_like(diagonal, self.usual_level(kind))
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
        return self._read_part(layer, INPUTS, self._moments_key(layer), part)

    def _moments_key(self, layer: str) -> str:
        return self.info["layers"][layer]["moments"]

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
        key = layer if kind == OUTPUTS else entry["moments"]
        if key != layer:
            continue
        diagonal = store._read_part(layer, kind, key, "diagonal")
        if problem_of(diagonal) is None:
            levels.append(float(diagonal.mean(dtype=np.float64)))
    return float(np.median(levels)) if levels else 1.0
