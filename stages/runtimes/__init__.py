"""Engines that serve a bundle, one file each. A runtime reads only the bundle."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from stages.tracking import Failure, StageError

MODULES = {  # runtime → its module here, how to install it
    "transformers": ("transformers", "pip install transformers"),
    "vllm": ("vllm", "make an environment of its own from requirements-vllm.txt, and name its interpreter in "
                     "evaluation.pythons.vllm"),
    "llama.cpp": ("llama_cpp", "pip install llama-cpp-python"),
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "onnxruntime-genai": ("onnxruntime_genai", "pip install 'quantline[genai]'"),
}


class Runtime(Protocol):
    """A loaded model."""

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
        return import_module(f"stages.runtimes.{module}").Engine
    except ImportError as error:
        raise StageError(Failure.RUNTIME_UNAVAILABLE,
                         f"expected {name}, and cannot import it: {error}; install it: {how}") from error


def open_runtime(name: str, bundle: Path, threads: int | None = None) -> Runtime:
    """Load a bundle. Raises StageError(runtime_unavailable) if the engine is not installed."""
    return engine(name)(bundle, threads)


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
