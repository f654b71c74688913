"""What a tool's script reads from and writes for benchmarks.quality, in the tool's environment."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEQUENCES_AT_ONCE = 8


class Job:
    """What `script.py <folder>` has to do.

    job.json in the folder says how to quantize, tokens.npz has the token ids.

    Attributes:
        model: Folder of the checkpoint.
        method: The method, where the tool has several.
        bits: Of a weight.
        group_size: Weights that share a scale.
        calibration: int32 [sequences, length].
        evaluation: int32 [sequences, length].
    """

    def __init__(self) -> None:
        """Read the job that the command line names."""
        self.folder = Path(sys.argv[1])
        job = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        self.model: str = job["model"]
        self.method: str = job["method"]
        self.bits: int = job["bits"]
        self.group_size: int = job["group_size"]
        with np.load(self.folder / "tokens.npz") as tokens:
            self.calibration = tokens["calibration"]
            self.evaluation = tokens["evaluation"]
        torch.set_num_threads(os.cpu_count() or 1)
        self._times = {"seconds": 0.0, "cpu_seconds": 0.0}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time the quantization itself, its calibration included; not loading and evaluation."""
        started = time.perf_counter()
        cpu_started = time.process_time()
        yield
        self._times["seconds"] = time.perf_counter() - started
        self._times["cpu_seconds"] = time.process_time() - cpu_started

    def finish(self, logprobs: np.ndarray) -> None:
        """Hand over the times and the log-probabilities on the evaluation text."""
        np.save(self.folder / "logprobs.npy", logprobs)
        (self.folder / "done.json").write_text(json.dumps(self._times), encoding="utf-8")


@torch.inference_mode()
def logprobs(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities float32 [sequences, length, V] of a model of transformers.

    Args:
        model: The model.
        tokens: int32 [sequences, length].
    """
    model = model.eval()
    batches = np.array_split(tokens, max(1, len(tokens) // SEQUENCES_AT_ONCE))
    parts = []
    for batch in batches:
        logits = model(torch.from_numpy(batch).long()).logits
        parts.append(torch.log_softmax(logits.float(), -1))
    return torch.cat(parts).numpy()
