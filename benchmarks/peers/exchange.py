"""What a peer's script reads from and writes for benchmarks/quality.py; it runs in the peer's environment."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


class Job:
    """`script.py <folder>`: job.json says what is asked, tokens.npz has the token ids int32 [sequences, length]."""

    def __init__(self) -> None:
        self.folder = Path(sys.argv[1])
        asked = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        self.model, self.method, self.bits, self.group_size = (asked[key] for key in ("model", "method", "bits", "group_size"))
        with np.load(self.folder / "tokens.npz") as tokens:
            self.calibration, self.evaluation = tokens["calibration"], tokens["evaluation"]
        torch.set_num_threads(os.cpu_count())
        self.seconds = self.cpu_seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """The quantization itself, its calibration included; loading and evaluation are not."""
        started, used = time.perf_counter(), time.process_time()
        yield
        self.seconds, self.cpu_seconds = time.perf_counter() - started, time.process_time() - used

    def finish(self, found: np.ndarray) -> None:
        """Hand over the log-probabilities and the time."""
        np.save(self.folder / "logprobs.npy", found)
        told = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        (self.folder / "done.json").write_text(json.dumps(told), encoding="utf-8")


@torch.inference_mode()
def logprobs(model, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 [sequences, length, V]."""
    model = model.eval()
    return torch.cat([torch.log_softmax(model(torch.from_numpy(part).long()).logits.float(), -1)
                      for part in np.array_split(tokens, max(1, len(tokens) // 8))]).numpy()
