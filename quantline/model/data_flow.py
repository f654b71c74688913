"""The flow of tensors between the modules of a block, watched while the block runs once.

Every operation of torch passes a dispatch mode, which notes for the memory of each result which
modules' outputs it was made of. So no code of the block is read, and no family has to be known.
"""

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Place = tuple[Hashable, ...]
# What makes numbers of which only the shape comes from the input.
SHAPE_ONLY = ("_like", "new_empty", "new_full", "new_ones", "new_zeros", "new_empty_strided")
COPIES = ("clone", "_to_copy")
# What a router does with its scores.
CHOICES = ("topk", "sort", "argsort", "argmax", "kthvalue")


@dataclass
class ModuleCalls:
    """What a module was given.

    Attributes:
        order: When it was first called, as a number.
        places: Of each call: which numbers it was given; equal for equal places in memory, also
            if there is a view or a copy between.
        sources: The modules whose outputs that was made of, with no other of them between.
        widths: Of each call: the last dimension of what it returned; 0 if that was no tensor.
    """

    order: int
    places: list[Place] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    widths: list[int] = field(default_factory=list)


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that an operation writes into."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return []
    values = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            values.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return tensors_in(values)


class DataFlow(TorchDispatchMode):
    """Watches one run of a block.

    Attributes:
        calls: Module → what it was given; of the producers, in the order of their first calls.
        readers: Producer → the innermost modules with parameters that its output reached.
        choosers: Producers whose output decided what is computed at all, as a router's does.
        leaving: Producers whose output the block's result was made of, with no other between.
        escaping: Producers whose output is kept somewhere when the block has run, as keys and
            values are that later blocks share.
    """

    def __init__(self, block: nn.Module, producers: set[str]) -> None:
        """Prepare for a run.

        Args:
            block: The block.
            producers: The modules between which the flow is told: linear layers and norms.
        """
        super().__init__()
        self.block = block
        self.producers = producers
        self.calls: dict[str, ModuleCalls] = {}
        self.readers: dict[str, set[str]] = defaultdict(set)
        self.choosers: set[str] = set()
        self.leaving: set[str] = set()
        self.escaping: set[str] = set()
        self._sources: dict[int, set[str]] = {}
        self._copied: dict[int, Place] = {}
        self._writes: dict[int, int] = defaultdict(int)
        # Holding what was made keeps an address from being given twice.
        self._made: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and note what its results are made of."""
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        places = [self._place(tensor) for tensor in inputs[:1]]
        out = func(*args, **kwargs)
        name = str(func.name()).removeprefix("aten::").partition(".")[0].rstrip("_")
        sources = self._sources_of(inputs)
        if name.endswith(SHAPE_ONLY):
            sources = set()
        if name in CHOICES:
            self.choosers |= sources
        for tensor in _written(func, args, kwargs):
            self._writes[_storage(tensor)] += 1
            self._sources.setdefault(_storage(tensor), set()).update(sources)
        known = {_storage(tensor) for tensor in inputs}
        for tensor in tensors_in(out):
            address = _storage(tensor)
            if address in known:
                continue
            self._made[address] = tensor.untyped_storage()
            self._sources.setdefault(address, set()).update(sources)
            if name in COPIES and tensor.dtype == inputs[0].dtype:
                self._copied[address] = places[0]
        return out

    def _sources_of(self, tensors: list[torch.Tensor]) -> set[str]:
        """Return what tensors are made of; what is only chosen by numbers is not made of them."""
        found: set[str] = set()
        for tensor in tensors:
            if tensor.is_floating_point() or tensor.is_complex():
                found |= self._sources.get(_storage(tensor), set())
        return found

    def _place(self, tensor: torch.Tensor) -> Place:
        """Return what tells the numbers of a tensor from those of others, but for its shape."""
        address = _storage(tensor)
        contiguous = tensor.is_contiguous()
        written = self._writes[address]
        whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        if address in self._copied and not written and contiguous and whole:
            return self._copied[address]
        layout = None if contiguous else (tuple(tensor.shape), tensor.stride())
        return (address, written, tensor.storage_offset(), tensor.numel(), layout)

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the block and return its result."""
        with self._hooked(), torch.no_grad(), self:
            result = run()
        out = tensors_in(result)
        self.leaving = self._sources_of(out)
        returned = {_storage(tensor) for tensor in out}
        kept = {
            address: StorageWeakRef(storage)
            for address, storage in self._made.items()
            if address not in returned and self._sources.get(address)
        }
        self._made.clear()
        if any(not storage.expired() for storage in kept.values()):
            gc.collect()
        for address, storage in kept.items():
            if not storage.expired():
                self.escaping |= self._sources[address]
        return result

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Listen to the modules."""
        handles = []
        for name, module in self.block.named_modules():
            is_leaf = not any(True for _ in module.children())
            if name in self.producers:
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
            if name in self.producers or (is_leaf and any(True for _ in module.parameters())):
                before = self._before(name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = tensors_in((args, kwargs))
            sources = self._sources_of(tensors)
            for source in sources:
                self.readers[source].add(name)
            if name in self.producers:
                calls = self.calls.setdefault(name, ModuleCalls(len(self.calls)))
                calls.places.append((*self._place(tensors[0]), tensors[0].shape[-1]))
                calls.sources |= sources

        return note

    def _after(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            one = isinstance(out, torch.Tensor)
            self.calls[name].widths.append(out.shape[-1] if one else 0)
            if one:
                self._sources[_storage(out)] = {name}

        return note
