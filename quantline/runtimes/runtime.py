"""Engines that serve a bundle, one file each. A runtime reads only the bundle."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from quantline.errors import Failure, StageError

MODULES = {  # runtime → its module here, how to install it
    "transformers": ("transformers", "pip install transformers"),
    "vllm": ("vllm", "make an environment of its own from requirements-vllm.txt, and name it in evaluation.pythons.vllm"),
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python"),
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "onnxruntime-genai": ("onnxruntime_genai", "pip install 'quantline[genai]'"),
}
PIECE_VALUES = 1 << 25  # logits that a runtime hands over at once, so that a large vocabulary needs no gigabytes
PIECE_TOKENS = 2048  # and tokens
Piece = tuple[slice, slice, np.ndarray]


class Runtime(Protocol):
    """A loaded model. One that can hand over part of a sequence's logits also has `pieces` (the function below)."""

    name: str
    version: str
    device: str

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Natural log-probabilities float32 [b, n, V] of the token after each of `tokens`, int32 [b, n]."""

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """The new tokens of greedy decoding with a KV cache, without the one that stopped it."""

    def encode(self, text: str) -> list[int]:
        """Token ids by the bundle's own tokenizer, without special tokens around the text."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""


def engine(name: str) -> Callable[[Path, int | None], Runtime]:
    """The class of an engine, imported only now. Raises StageError(runtime_unavailable) if it is not installed."""
    module, how = MODULES[name]
    try:
        return import_module(f"quantline.runtimes.{module}").Engine
    except ImportError as error:
        raise StageError(Failure.RUNTIME_UNAVAILABLE,
                         f"expected {name}, and cannot import it: {error}; install it: {how}") from error


def open_runtime(name: str, bundle: Path, threads: int | None = None) -> Runtime:
    """Load a bundle. Raises StageError(runtime_unavailable) if the engine is not installed."""
    return engine(name)(bundle, threads)


def pieces(runtime: Runtime, tokens: np.ndarray, first: int, end: int) -> Iterator[Piece]:
    """(sequences, positions, logits float32 [b, m, V] or log-probabilities) that cover `tokens` int32 [n, length] from
    position `first` to before `end`. What is handed over holds until the next piece is asked for.
    """
    if hasattr(runtime, "pieces"):
        yield from runtime.pieces(tokens, first, end)
        return
    count, length = tokens.shape
    step = max(1, PIECE_TOKENS // length)
    for start in range(0, count, step):
        rows = slice(start, min(count, start + step))
        yield rows, slice(first, end), runtime.logprobs(tokens[rows])[:, first:end]


def continued(tokens: np.ndarray, first: int, end: int, size: int, run) -> Iterator[Piece]:
    """Pieces of a runtime that goes on where it stopped: `run(ids, cache)` gives the logits [b, m, V] of `ids` int32 [b, m]
    and a cache, None at a sequence's begin; `size` is V.
    """
    count, length = tokens.shape
    step = max(1, min(PIECE_TOKENS // length, PIECE_VALUES // (length * size)))
    for start in range(0, count, step):
        rows, cache, places = slice(start, min(count, start + step)), None, max(1, PIECE_VALUES // (step * size))
        for place in range(0, length, places):
            logits, cache = run(tokens[rows, place:place + places], cache)
            inside = slice(max(place, first), min(place + places, end))
            if inside.start < inside.stop:
                yield rows, inside, logits[:, inside.start - place:inside.stop - place]


def greedy(first: np.ndarray, step, max_new_tokens: int, stop: set[int]) -> list[int]:
    """Take the most probable token again and again: `first` [V] are the prompt's last logits, `step(token)` the next."""
    ids, logits = [], first
    while len(ids) < max_new_tokens:
        token = int(np.argmax(logits))
        if token in stop:
            break
        ids.append(token)
        if len(ids) < max_new_tokens:
            logits = step(token)
    return ids
