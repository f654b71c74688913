"""Whether the plain copy of a GGUF file is the model that llama.cpp runs."""

from pathlib import Path

import numpy as np

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize.gguf.llama_cpp import logits_of
from quantline.model.checkpoint import Checkpoint

CHECKED_TOKENS = 32
# llama.cpp rounds the inputs of its products to 8 bits, which changes logits by some hundredths of
# their spread, and now and then takes another expert; a head in another place, or a norm left out,
# changes most tokens by half and more.
TOLERANCE = 0.25


def check_agreement(path: Path, checkpoint: Checkpoint) -> None:
    """Compare the logits of the copy with those of llama.cpp on the file.

    Args:
        path: The file.
        checkpoint: What was read from it, already found whole.

    Raises:
        StageError: unsupported_architecture, non_finite.
    """
    import torch

    from quantline.model.block_runner import final_hidden_states
    from quantline.model.output_head import OutputHead

    generator = np.random.default_rng(0)
    tokens = generator.integers(0, checkpoint.arch.vocab_size, CHECKED_TOKENS).astype(np.int32)
    theirs = logits_of(path, tokens)
    hidden = final_hidden_states(checkpoint, tokens[None], "comparing with llama.cpp")
    head = OutputHead.of(checkpoint).to_torch(torch.device("cpu"))
    ours = head.logits(torch.from_numpy(hidden)).numpy()[0]
    for whose, logits in (("transformers", ours), ("llama.cpp", theirs)):
        if not (np.isfinite(logits).all() and (np.ptp(logits, axis=-1) > 0).any()):
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite logits of the model in {path}, of which some are higher, found "
                f"others in {whose}; the quantization broke, take another file",
            )
    difference = relative_difference(ours, theirs)
    if not difference <= TOLERANCE:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected the logits of the model in {path} to be those of llama.cpp, found a "
            f"difference of {difference:.0%} of their spread: transformers reads this kind of file "
            "otherwise; start from the model's Hugging Face folder",
        )


def relative_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return how far the logits of the middle one of the tokens are apart, of their own spread.

    A number that all logits of a token share changes nothing, and is left out.

    Args:
        ours: Logits [tokens, vocabulary].
        theirs: The same of whom they are compared with.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    centred = theirs - theirs.mean(-1, keepdims=True)
    apart = ours - ours.mean(-1, keepdims=True) - centred
    shares = np.linalg.norm(apart, axis=-1) / np.linalg.norm(centred, axis=-1)
    return float(np.median(shares))
