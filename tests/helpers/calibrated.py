"""Calibrations of tiny models, without the stage."""

from pathlib import Path

import numpy as np

from quantline.calibration.collect import collect_statistics
from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.store import INFO, CalibrationStore
from quantline.files import write_json, write_tensors
from quantline.model.checkpoint import Checkpoint


def calibrate_into(
    folder: Path,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    seed: int | None = 0,
    weighted: bool = False,
) -> CalibrationStore:
    """Collect the statistics of a model on tokens int32 [sequences, length] in a new folder."""
    folder.mkdir()
    layers = collect_statistics(checkpoint, tokens, folder, seed, weighted)
    info = {
        "layers": layers,
        "curvature": seed is not None,
        "weights": "gradient" if weighted else "equal",
        "text_sha256": "",
        "tokens": tokens.size,
        "seed": seed or 0,
    }
    write_tensors(folder / TOKENS, {"tokens": tokens})
    write_json(folder / INFO, info)
    return CalibrationStore(folder)
