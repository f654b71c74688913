"""Statistics of the embedding and the output head: what rounding them costs.

Final hidden states of some tokens, on which the logits of a rounded head are compared with the
head's own; and, with gradients, the second moments of the gradient at what enters the first block.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from quantline.calibration import packing
from quantline.files import check_made, write_tensors

if TYPE_CHECKING:
    import torch

    from quantline.calibration.output_moments import OutputSums
    from quantline.model.block_runner import BlockRun

FINAL = "final.safetensors"
EMBEDDING = "embedding.safetensors"
TOKENS = "tokens.safetensors"
SAMPLE_TOKENS = 1024  # tokens whose final states are kept


def sample_final_states(run: "BlockRun", tokens: int) -> "torch.Tensor":
    """Return final hidden states of sampled tokens, float32 [sampled, hidden].

    Args:
        run: Its `hidden` is what leaves the last block.
        tokens: Tokens of the text, over which the sample is evenly spread.
    """
    import torch

    from quantline.model.device import device

    stride = max(1, tokens // SAMPLE_TOKENS)
    parts = []
    with torch.no_grad(), run.tail() as tail:
        for number, batch in enumerate(run.hidden):
            final = tail(number, batch.to(device())).cpu()
            parts.append(final.reshape(-1, final.shape[-1])[::stride])
    return torch.cat(parts)


def keep_final_states(states: "torch.Tensor", folder: Path) -> None:
    """Write final hidden states [sampled, hidden] as float16 shares of each channel's peak.

    The peak is the largest magnitude; it is written too.
    """
    import torch

    if not states.isfinite().all():  # of a sequence on which the model overflows
        states = states[states.isfinite().all(1)]
    peak = states.abs().amax(0)
    shares = states / peak.clamp(min=torch.finfo(torch.float32).tiny)
    write_tensors(folder / FINAL, {"peak": peak.numpy(), "sample": shares.half().numpy()})


def embedding_sums(
    gradients: "Iterable[torch.Tensor]", limit: int, ends: Collection[int]
) -> "OutputSums":
    """Return the sums of which G of the embedding is made.

    Args:
        gradients: At what enters the first block, in batches.
        limit: Channels that one block of G spans at most.
        ends: Numbers of the batches with which a part of the text ends.
    """
    from quantline.calibration.output_moments import OutputMoments

    kept: list[OutputSums] = []
    moments = OutputMoments(limit, lambda *given, **more: None, raw=True)
    for number, batch in enumerate(gradients):
        moments.add("embedding", batch)
        if number in ends:
            moments.end_part()
    moments.close(lambda name, sums: kept.append(sums))
    return kept[0]


def keep_embedding_moments(sums: "OutputSums", folder: Path) -> None:
    """Write G of the embedding, shrunk as those of the linear layers are."""
    fisher_out, more = sums.finish()
    diagonal, triangle = packing.pack(fisher_out)
    write_tensors(folder / EMBEDDING, {"diagonal": diagonal, "triangle": triangle, **more})


def final_states(folder: Path) -> np.ndarray:
    """Return the kept final states, float32 [tokens, hidden]."""
    tensors = load_file(folder / FINAL)
    return tensors["sample"].astype(np.float32) * tensors["peak"]


def embedding_fisher(folder: Path) -> np.ndarray:
    """Return G of what enters the first block, in diagonal blocks float32 [blocks, n, n]."""
    tensors = load_file(folder / EMBEDDING)
    return packing.unpack(tensors["diagonal"], tensors["triangle"])


def calibration_tokens(folder: Path) -> np.ndarray:
    """Return the tokens of a calibration, int32 [sequences, length].

    Raises:
        StageError: missing_file.
    """
    path = folder / TOKENS
    check_made(path, "calibrate", what="the tokens of the calibration")
    with safe_open(path, "np") as file:
        return file.get_tensor("tokens")


def token_frequencies(folder: Path, vocabulary: int) -> np.ndarray:
    """Return the share of each token in the calibration text, float64 [vocabulary].

    One more of each token is counted, so that none has the share 0.
    """
    counts = np.bincount(calibration_tokens(folder).reshape(-1), minlength=vocabulary) + 1.0
    return counts / counts.sum()
