"""Statistics over given tokens: what the stage `calibrate` collects over a text."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from quantline.calibration.collect import collect_statistics, remove_progress
from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.store import INFO
from quantline.files import sha256_json, write_json
from quantline.model.checkpoint import Checkpoint

SEED = 0  # of the labels that gradients are taken with


def calibrate(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    folder: Path,
    gradients: bool,
    weighted: bool = True,
) -> None:
    """Write a folder of statistics that CalibrationStore reads.

    Args:
        checkpoint: The unquantized model.
        tokens: int32 [sequences, length].
        folder: It is made.
        gradients: Whether to collect the second moments of output gradients too.
        weighted: Whether tokens count by them in the moments of the inputs.

    Raises:
        StageError: non_finite, calibration_empty.
    """
    folder.mkdir()
    weighted = weighted and gradients
    layers = collect_statistics(checkpoint, tokens, folder, SEED if gradients else None, weighted)
    remove_progress(folder)
    save_file({"tokens": np.ascontiguousarray(tokens)}, folder / TOKENS)
    info = {
        "layers": layers,
        "curvature": gradients,
        "weights": "gradient" if weighted else "equal",
        "tokens": int(tokens.size),
        "seed": SEED,
        "sequences": len(tokens),
        "length": tokens.shape[1],
        "text_sha256": sha256_json(tokens.tolist()),
    }
    write_json(folder / INFO, info)
