"""A tiny checkpoint of any architecture: transformers' own code, and the demo's tokenizer.

The weights are those that transformers draws, brought to a size at which every layer has its say:
matrices have the standard deviation of one over the root of their inputs, and every parameter gets
some noise, so that no norm is all ones and no bias all zeros.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.models.architectures import Architecture
from benchmarks.models.kinds import kind_of
from benchmarks.models.tiny_config import tiny_config
from benchmarks.paths import ROOT

LARGEST = 40_000_000  # parameters of a model that counts as tiny
NOISE = 0.05
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TRIED = (2, 12)  # sequences and tokens that a new model is tried on


class NotTinyError(Exception):
    """A model of this architecture cannot be made tiny, or is none that goes on with a text."""


class MadeCheckpoint(NamedTuple):
    """What was made.

    Attributes:
        class_name: Of the model.
        parameters: How many it has.
        kind: What it is made of, as `kind_of` says.
    """

    class_name: str
    parameters: int
    kind: str


def write_checkpoint(architecture: Architecture, folder: Path, seed: int = 0) -> MadeCheckpoint:
    """Write a checkpoint in bfloat16 into a new folder.

    Args:
        architecture: What to make.
        folder: It is made.
        seed: Of the weights.

    Raises:
        NotTinyError: If it stays large, or what it says of a token depends on later ones.
        Exception: Whatever transformers raises.
    """
    import torch
    import transformers

    vocabulary = _vocabulary()
    config = tiny_config(architecture.model_type, vocabulary, architecture.options)
    auto = getattr(transformers, architecture.auto)
    with torch.device("meta"):
        empty = auto.from_config(config, dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    if parameters > LARGEST:
        raise NotTinyError(f"{parameters / 1e6:.0f} M parameters with the sizes that are known")
    if empty.config.is_encoder_decoder:
        raise NotTinyError("it is no decoder: it reads a text with an encoder of its own")
    with _unwritten_memory_seen():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config, dtype=torch.float32).eval()
            _draw_weights(model)
        model = model.to(torch.bfloat16)
        model.save_pretrained(folder)
        for name in TOKENIZER:
            shutil.copy(ROOT / "demo/model" / name, folder)
        kind = _try(_read_back(auto, folder), vocabulary, seed)
    return MadeCheckpoint(type(model).__name__, parameters, kind)


@contextmanager
def _unwritten_memory_seen() -> Iterator[None]:
    """Have memory that no one has written to hold NaN, so that it is noticed."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _read_back(auto: Any, folder: Path) -> Any:
    """Return the model of a checkpoint, whose weights have all to be found.

    Raises:
        NotTinyError: If they are not.
    """
    import torch

    model, loading = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {kind: sorted(map(str, names))[:3] for kind, names in loading.items() if names}
    if problems:
        raise NotTinyError(f"transformers does not find the weights that it saved: {problems}")
    return model.eval()


def _vocabulary() -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(ROOT / "demo/model/tokenizer.json")).get_vocab_size()


def _draw_weights(model: Any) -> None:
    """Bring the weights to a size at which every layer counts."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if not parameter.is_floating_point():
                    continue
                noise = torch.randn_like(parameter)
                if parameter.ndim < 2 or min(parameter.shape[-2:]) == 1:
                    parameter.nan_to_num_(0.0).add_(noise, alpha=NOISE)
                    continue
                size = _inputs(module, parameter) ** -0.5
                spread = parameter.std()
                # What transformers leaves undrawn, or draws as all the same, is drawn here.
                if torch.isfinite(spread) and spread > 1e-6:
                    parameter.mul_(size / spread).add_(noise, alpha=NOISE * size)
                else:
                    parameter.copy_(noise * size)


def _inputs(module: Any, parameter: Any) -> int:
    """Return how many inputs of a layer lead to one of its outputs."""
    from transformers.pytorch_utils import Conv1D

    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return parameter.shape[-2 if transposed else -1]


def _try(model: Any, vocabulary: int, seed: int) -> str:
    """Run a model on two texts that differ in their last token; return the kind of model.

    Raises:
        NotTinyError: If the logits before it differ as well, or are not finite.
    """
    import torch

    rows, length = TRIED
    tokens = np.random.default_rng(seed).integers(1, vocabulary, (rows, length))
    others = tokens.copy()
    others[:, -1] = (tokens[:, -1] + 1) % vocabulary
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits
        changed = model(input_ids=torch.from_numpy(others), use_cache=False).logits
    if tuple(logits.shape[:2]) != (rows, length):
        raise NotTinyError(
            f"its logits are {tuple(logits.shape)} for {rows} texts of {length} tokens"
        )
    if not torch.isfinite(logits).all():
        raise NotTinyError("its logits are not finite with random weights")
    if (logits[:, :-1] - changed[:, :-1]).abs().max() > 1e-4 * logits.abs().max():
        raise NotTinyError("it is no decoder: what it says of a token depends on later ones")
    return kind_of(model)
