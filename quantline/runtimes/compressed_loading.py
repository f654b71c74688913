"""Loading compressed-tensors in transformers, whose own initialization stumbles over it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_needless_initialization() -> Iterator[None]:
    """Have transformers not initialize modules whose layers are compressed.

    It initializes every module before it reads a file, and what a Mamba mixer or Falcon's class of
    linear layers does there looks for the weight of a layer that has only a packed one. Whatever is
    initialized there is read from the file afterwards (a bundle of which anything is missing is
    refused); modules that compute something which is not stored are initialized as ever.
    """
    from torch import nn
    from transformers import PreTrainedModel

    original = PreTrainedModel._initialize_weights

    def initialize(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        compressed = any(
            isinstance(child, nn.Linear) and "weight" not in child._parameters
            for child in (module, *module.children())
        )
        if compressed and not module._non_persistent_buffers_set:
            return
        original(self, module, *args, **kwargs)

    PreTrainedModel._initialize_weights = initialize
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original
