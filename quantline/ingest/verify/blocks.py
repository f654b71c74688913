"""Whether a model runs, and block by block as transformers runs it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.causes import OF_MACHINE, failure_of, reading_foreign
from quantline.errors import Failure, StageError
from quantline.ingest.verify.inputs import InputTracer
from quantline.model.checkpoint import Checkpoint
from quantline.model.configuration import CONFIG
from quantline.model.stored_view import StoredView, plain_view
from quantline.model.structure import Structure

if TYPE_CHECKING:
    import torch

CHECKED_TOKENS = 16
TOLERANCE = 1e-4  # of the greatest logit


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, f"a {CONFIG} that transformers' own model runs")
def check_runs(checkpoint: Checkpoint) -> None:
    """Refuse what transformers builds and cannot run, such as an unknown kind of attention.

    Raises:
        StageError: unsupported_architecture.
    """
    from quantline.model.block_runner import BlockRun

    BlockRun(checkpoint, np.zeros((1, 1), np.int32))


def check_blocks(checkpoint: Checkpoint) -> Structure:
    """Compare the run block by block with transformers' forward pass, and note what is seen there.

    Done for a model whose family has no table, so that nothing is measured on another model. Two
    texts are run that are alike in their first half: what the model says there has to be the same,
    since a token that saw later ones could not be written one after the other.

    Returns:
        The structure, with how blocks return, and how logits come out of the head.

    Raises:
        StageError: unsupported_architecture, also if the logits are not finite.
    """
    assert checkpoint.structure is not None, "the model has no table"
    try:
        return _compare(checkpoint, checkpoint.structure)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, StageError) or failure_of(error) in OF_MACHINE:
            raise  # torch says in words alone that there is no memory
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise _refusal(
            checkpoint, f"to run block by block as {checkpoint.structure.class_name}", words
        ) from error


def _compare(checkpoint: Checkpoint, structure: Structure) -> Structure:
    import torch

    from quantline.model.block_runner import BlockRun
    from quantline.model.output_head import OutputHead
    from quantline.model.whole_model import WholeModel

    rows = min(structure.vocab_size, checkpoint.shape(structure.embedding)[0])
    tokens = unlike_texts(rows, _special_tokens(checkpoint.config))
    whole = WholeModel(checkpoint).run(tokens)
    size = float(whole.logits.abs().max())
    if not np.isfinite(size):
        raise _refusal(checkpoint, "to have finite logits", "NaN or infinity")
    half = CHECKED_TOKENS // 2
    seen_later = float((whole.logits[0] - whole.logits[1])[:half].abs().max())
    if not seen_later <= TOLERANCE * size:
        raise _refusal(
            checkpoint,
            "to be causal, so that a token's logits do not depend on later tokens",
            f"a difference of {seen_later:.3g} of {size:.3g}: take a causal model",
        )
    products, logits = whole.products.numpy(), whole.logits.numpy()
    transform = logit_transform(products, logits, checkpoint.configuration)
    if transform is None:
        raise _refusal(
            checkpoint,
            "to scale its logits or to cap them by tanh, if it changes them after the head",
            f"logits up to {size:.3g} for products up to {np.abs(products).max():.3g}",
        )
    scale, softcap = transform
    found = replace(structure, returns=whole.returns, logit_scale=scale, logit_softcap=softcap)
    checked = Checkpoint(checkpoint.folder, checkpoint.configuration, found)
    known = _by_names(whole.outside, checked)
    blocks = BlockRun(checked, tokens, rows=1, known=known)
    tracer = InputTracer(blocks)
    blocks.forward("checking blocks", tracer.watch)
    hidden = torch.from_numpy(blocks.final_states())
    arch = checked.arch
    weight = known[arch.head].cpu()
    bias = known[arch.head_bias].cpu() if arch.head_bias else None
    head = OutputHead(weight, arch.logit_scale, arch.logit_softcap, bias)
    streamed = torch.stack([head.logits(states) for states in hidden])
    difference = float((streamed - torch.from_numpy(logits)).abs().max())
    if not difference <= TOLERANCE * size:
        raise _refusal(
            checkpoint,
            "to have the same logits block by block as in transformers' own forward pass",
            f"a difference of {difference:.3g} of {size:.3g}",
        )
    return tracer.structure(found)


def _by_names(
    values: dict[StoredView, "torch.Tensor"], checkpoint: Checkpoint
) -> dict[str, "torch.Tensor"]:
    """Return values by the names of tensors instead of where they are stored."""
    found = {}
    for name in checkpoint.names:
        view = checkpoint.view_of(name) or plain_view(name, checkpoint.shape(name))
        if view in values:
            found[name] = values[view]
    return found


def unlike_texts(vocabulary: int, avoid: set[int]) -> np.ndarray:
    """Return two texts of random tokens that are alike in their first half, int32 [2, length].

    Args:
        vocabulary: How many tokens there are.
        avoid: Those that stand for something else than text, such as an image.
    """
    generator = np.random.default_rng(0)
    usual = np.setdiff1d(np.arange(vocabulary), sorted(avoid))
    tokens = generator.choice(usual if len(usual) else vocabulary, (2, CHECKED_TOKENS))
    half = CHECKED_TOKENS // 2
    tokens[1, :half] = tokens[0, :half]
    return tokens.astype(np.int32)


def _special_tokens(config: dict[str, Any]) -> set[int]:
    """Return the tokens that config.json has a name for."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _special_tokens(value)
        elif "token" in key and key.endswith(("_id", "_ids", "_index")):
            found.update(one for one in np.ravel([value]).tolist() if type(one) is int)
    return found


def logit_transform(
    products: np.ndarray, logits: np.ndarray, configuration: dict[str, Any]
) -> tuple[float, float | None] | None:
    """Find out what a model does to the products of its head.

    Args:
        products: What left the head.
        logits: What the model made of that.
        configuration: Its numbers are tried as softcaps, and the scale is taken from them if it is
            one of them, or the inverse of one.

    Returns:
        (scale, softcap) as OutputHead has them; None if it is something else.
    """
    size = float(np.abs(logits).max())
    numbers = sorted(
        {float(value) for value in configuration.values() if type(value) in (int, float)}
    )
    named = [value for value in numbers if np.isfinite(value) and value > 0]
    for softcap in (None, *named):
        inner = logits
        if softcap is not None:
            if size >= softcap:
                continue
            inner = np.arctanh(logits.astype(np.float64) / softcap) * softcap
        scale = _scale(products, inner, named)
        made = products * scale
        if softcap is not None:
            made = np.tanh(made / softcap) * softcap
        if np.abs(made - logits).max() <= TOLERANCE / 10 * size:
            return scale, softcap
    return None


def _scale(products: np.ndarray, logits: np.ndarray, named: list[float]) -> float:
    """Return the factor between two arrays, as one of some numbers or its inverse if it is near."""
    largest = np.abs(products) >= np.abs(products).max() / 2
    factor = float(np.median(logits[largest] / products[largest]))
    for value in (1.0, *named):
        for candidate in (value, 1 / value):
            if abs(candidate - factor) <= 1e-5 * abs(factor):
                return candidate
    return factor


def _refusal(checkpoint: Checkpoint, expected: str, found: str) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {checkpoint.arch.model_type} {expected}, found {found}; take another model",
    )
