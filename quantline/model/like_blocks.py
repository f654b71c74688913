"""What was found out about one block's inputs, taken over for a block like it.

Like blocks are built alike and called alike. That proves nothing of what they compute; so what was
found is taken over only if the same layers were given the same tensors, and if scaling all pairs
leaves what this block returns as it is to the last bit. Otherwise it is traced like the first.
"""

from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from quantline.model.block_calls import Call
from quantline.model.family import InputGroup
from quantline.model.fold_candidates import linears_in, norms_in
from quantline.model.fold_test import FoldTest, same
from quantline.model.recorded_inputs import RecordedInputs

INTERNALS = frozenset(vars(nn.Module()))


class Shown(NamedTuple):
    """What one run of a block shows of its linear layers.

    Attributes:
        given: For each layer in the order of use, which of all tensors it was given, call by call.
        empty: Layers that were given no tokens.
        odd: Layers whose inputs were not finite, or zero.
        crooked: Layers that do more than multiply.
    """

    given: tuple[tuple[str, tuple[int, ...]], ...]
    empty: frozenset[str]
    odd: frozenset[str]
    crooked: frozenset[str]


def shown_by(record: RecordedInputs) -> Shown:
    """Return what a recorded run shows."""
    numbers: dict[Hashable, int] = {}
    given = tuple(
        (name, tuple(numbers.setdefault(place, len(numbers)) for place in places))
        for name, places in record.places.items()
    )
    inputs = record.inputs.items()
    empty = {name for name, tensors in inputs if not all(one.numel() for one in tensors)}
    odd = {name for name, tensors in inputs if not all(map(_is_usual, tensors))}
    return Shown(given, frozenset(empty), frozenset(odd), frozenset(record.crooked))


def _is_usual(tensor: torch.Tensor) -> bool:
    return bool(tensor.isfinite().all()) and bool(tensor.any())


class Form:
    """How a block is built and called, to be held against that of another."""

    def __init__(self, block: nn.Module, number: int, call: Call) -> None:
        """Note it.

        Args:
            block: A decoder block.
            number: Its number, which may stand in attributes such as layer_idx.
            call: How it is called.
        """
        self._number = (int, number)
        self._parts: list[Hashable] = []
        for name, module in block.named_modules():
            own = {key: value for key, value in vars(module).items() if key not in INTERNALS}
            self._parts += _parts_of([name, type(module), module._parameters, module._buffers, own])
        self._parts += _parts_of([call.hidden, call.args, call.kwargs])

    def is_like(self, other: "Form") -> bool:
        """Whether all is the same but for the blocks' numbers."""
        numbers = (self._number, other._number)
        return len(self._parts) == len(other._parts) and all(
            pair[0] == pair[1] or pair == numbers
            for pair in zip(self._parts, other._parts, strict=True)
        )


def _parts_of(value: Any) -> Iterator[Hashable]:
    """Yield what is equal for alike values; tensors are by their shapes and types."""
    if isinstance(value, torch.Tensor):
        yield (tuple(value.shape), value.dtype)
    elif isinstance(value, dict | list | tuple):
        yield (type(value), len(value))
        for inner in value.items() if isinstance(value, dict) else value:
            yield from _parts_of(inner)
    else:
        is_plain = value is None or isinstance(value, bool | int | float | str | type)
        yield (type(value), value if is_plain or isinstance(value, torch.dtype) else id(value))


def holds_likewise(
    block: nn.Module, run: Callable[[], Any], groups: Collection[InputGroup], shown: Shown
) -> bool:
    """Whether what was found of one block is so of another that is like it.

    Args:
        block: The other block, loaded.
        run: Runs it, as in find_input_groups.
        groups: Those of the first block, by names inside the block.
        shown: What the first block showed.
    """
    record = RecordedInputs(run, linears_in(block), {})
    if shown_by(record) != shown:
        return False
    pairs = [group for group in groups if group.before is not None]
    if not pairs:
        return same(run(), record.result)
    test = FoldTest(block, run, norms_in(block), torch.Generator().manual_seed(0))
    return test.holds(pairs, record.result, draws=1)
