"""What blocks of one forward pass leave for later blocks in a mapping, such as keys and values.

Blocks run over all batches one after the other, so what a block leaves belongs to the batch. In the
backward pass a block that reads it hands a gradient to the block that wrote it.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from quantline.model.device import device

BEFORE = -1  # the number of the block that a value is from which was there before the first


class _Version(NamedTuple):
    """A value that a block wrote, or BEFORE."""

    block: int
    value: Any


class SharedState(UserDict):
    """A mapping that stands in for a model's own, for the blocks of one batch.

    Only the last value of a key is kept, and those that another block has read.

    Attributes:
        block: The block that runs; set by whoever runs it.
        backward: Whether it runs for gradients.
    """

    def __init__(self, content: Mapping[Any, Any]) -> None:
        """Begin with what the model itself has put there, before the first block."""
        super().__init__()
        self.block = 0
        self.backward = False
        self._versions = {key: [_Version(BEFORE, value)] for key, value in content.items()}
        self._read: set[tuple[Any, int]] = set()  # (key, block that wrote it)
        self._fresh: dict[Any, Any] = {}  # written by the block that runs for gradients
        self._leaves: dict[tuple[Any, int], Any] = {}
        self._gradients: dict[tuple[Any, int], list[torch.Tensor | None]] = {}

    def _before(self, key: Any) -> _Version:
        """Return the value that the running block sees. Raises KeyError if there is none."""
        versions = [version for version in self._versions.get(key, ()) if self._is_seen(version)]
        if not versions:
            raise KeyError(key)
        return versions[-1]

    def _is_seen(self, version: _Version) -> bool:
        return version.block < self.block or (version.block == self.block and not self.backward)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.backward:
            self._fresh[key] = value
            return
        versions = self._versions.setdefault(key, [])
        versions[:] = [
            version
            for version in versions
            if version.block == BEFORE
            or ((key, version.block) in self._read and version.block != self.block)
        ]
        versions.append(_Version(self.block, map_tensors(value, torch.Tensor.detach)))

    def __getitem__(self, key: Any) -> Any:
        if key in self._fresh:
            return self._fresh[key]
        version = self._before(key)
        name = (key, version.block)
        if version.block == BEFORE:
            return version.value
        if version.block != self.block:
            self._read.add(name)
        if not self.backward:
            return version.value
        if name not in self._leaves:
            self._leaves[name] = map_tensors(version.value, _leaf)
        return self._leaves[name]

    def __contains__(self, key: object) -> bool:
        if key in self._fresh:
            return True
        return any(self._is_seen(version) for version in self._versions.get(key, ()))

    def __iter__(self) -> Any:
        return (key for key in {**self._versions, **self._fresh} if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def begin(self, block: int, backward: bool) -> None:
        """Say which block runs next."""
        self.block = block
        self.backward = backward
        self._fresh = {}
        self._leaves = {}

    def begin_again(self) -> None:
        """Forget what blocks left in an earlier pass, but not what was there before the first."""
        before = {
            key: [version for version in versions if version.block == BEFORE]
            for key, versions in self._versions.items()
        }
        self._versions = {key: versions for key, versions in before.items() if versions}
        self._read = set()
        self._fresh = {}
        self._leaves = {}
        self._gradients = {}

    def outputs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the tensors that the block wrote, with the gradients that later blocks gave."""
        pairs = []
        for key, value in self._fresh.items():
            gradients = self._gradients.pop((key, self.block), None)
            if gradients is None:
                continue
            for tensor, gradient in zip(tensors_in(value), gradients, strict=True):
                if gradient is not None and tensor.requires_grad:
                    pairs.append((tensor, gradient))
        return pairs

    def written(self) -> list[torch.Tensor]:
        """Return the tensors that the running block has written."""
        return [
            tensor
            for versions in self._versions.values()
            for version in versions
            if version.block == self.block
            for tensor in tensors_in(version.value)
        ]

    def keep_gradients(self) -> None:
        """Add up the gradients at what the block read, for the blocks that wrote it."""
        for name, value in self._leaves.items():
            new = [tensor.grad for tensor in tensors_in(value)]
            old = self._gradients.get(name, [None] * len(new))
            self._gradients[name] = [
                one if other is None else other if one is None else one + other
                for one, other in zip(new, old, strict=True)
            ]
        self._fresh = {}
        self._leaves = {}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(device()).requires_grad_(True)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a value with its tensors changed, in tuples and lists too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(inner, change) for inner in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a value, in tuples and lists too."""
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(value, note)
    return found
