"""The log-probabilities of a whole model as transformers runs it, and how far a bundle is off."""

from pathlib import Path
from typing import Any

import numpy as np

from quantline.runtimes.runtime import open_runtime

FILE = "whole.npz"


def run_whole(checkpoint: Path, auto: str, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities float32 [sequences, length, vocabulary] in float32.

    Args:
        checkpoint: Its folder.
        auto: The class of transformers that loads it.
        tokens: int32 [sequences, length].
    """
    import torch
    import transformers

    model = getattr(transformers, auto).from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits
        return torch.log_softmax(logits.float(), -1).numpy()


def largest_difference(bundle: str, runtime: str, whole: str) -> dict[str, Any]:
    """Return by how many nats a bundle's log-probabilities are off at most.

    Args:
        bundle: Its folder.
        runtime: Its runtime's name.
        whole: File with the `tokens` and the whole model's `logprobs`.
    """
    with np.load(whole) as file:
        tokens = file["tokens"]
        expected = file["logprobs"]
    found = open_runtime(runtime, Path(bundle), 1).logprobs(tokens)
    width = min(found.shape[-1], expected.shape[-1])
    difference = np.abs(found[..., :width] - expected[..., :width]).max()
    return {"difference": float(difference)}
