"""What the calibration keeps of the model's two ends, where rounding the embedding and the head is felt.

Final hidden states of some tokens, on which the logits of a rounded head can be held against the head's own; and, with
gradients, the output factor of the embedding: the second moments of the gradient at what enters the first block.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from quantline.calibration import packing

if TYPE_CHECKING:
    import torch

    from quantline.model.block_runner import BlockRun

FINAL, EMBEDDING, TOKENS = "final.safetensors", "embedding.safetensors", "tokens.safetensors"
SAMPLE = 1024  # tokens whose final states are kept


def keep_final(run: "BlockRun", tokens: int, folder: Path) -> None:
    """Write the normed final states, evenly spread over the `tokens` of the text; `run.hidden` is what leaves the last block.

    As shares of each channel's largest, in half precision.
    """
    import torch

    from quantline.model.device import device

    stride, kept = max(1, tokens // SAMPLE), []
    with torch.no_grad(), run.final_norm() as norm:
        for batch in run.hidden:
            kept.append(norm(batch.reshape(-1, batch.shape[-1])[::stride].to(device())).cpu())
    states = torch.cat(kept)
    peak = states.abs().amax(0)
    shares = states / peak.clamp(min=torch.finfo(torch.float32).tiny)
    save_file({"peak": peak.numpy(), "sample": shares.half().numpy()}, folder / FINAL)


def keep_embedding(gradients: Iterable["torch.Tensor"], limit: int, folder: Path) -> None:
    """Write the output factor of the embedding, in blocks of at most `limit`, from the gradients at what enters the first
    block. It is shrunk as those of the linear layers are.
    """
    from quantline.calibration.output_moments import OutputMoments

    def keep(name: str, factors: np.ndarray, shrinkage: np.ndarray) -> None:
        diagonal, triangle = packing.pack(factors)
        save_file({"diagonal": diagonal, "shrinkage": shrinkage, "triangle": triangle}, folder / EMBEDDING)

    moments = OutputMoments(limit, keep)
    for batch in gradients:
        moments.add("embedding", batch)
    moments.close()


def final_states(folder: Path) -> np.ndarray:
    """The kept final states, float32 [tokens, hidden]."""
    found = load_file(folder / FINAL)
    return found["sample"].astype(np.float32) * found["peak"]


def embedding_factors(folder: Path) -> np.ndarray:
    """G of what enters the first block, in diagonal blocks: float32 [blocks, size, size]."""
    found = load_file(folder / EMBEDDING)
    return packing.unpack(found["diagonal"], found["triangle"])


def frequencies(folder: Path, vocabulary: int) -> np.ndarray:
    """The share of each token in the calibration text, float64 [vocabulary]; one more of each is counted, so that none has 0."""
    with safe_open(folder / TOKENS, "np") as file:
        counts = np.bincount(file.get_tensor("tokens").reshape(-1), minlength=vocabulary) + 1.0
    return counts / counts.sum()
