"""What the scales of an input might be folded into, as far as the flow of a block's tensors tells.

Many a module before an input is ruled out here, each with its reason in words. What is left has
still to be tried (fold_test.py).
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from quantline.model.data_flow import DataFlow
from quantline.model.family import InputGroup
from quantline.model.fold_test import find_norm_offset, same
from quantline.model.recorded_inputs import RecordedInputs

Linears = tuple[str, ...]
Run = Callable[[], Any]


class RefusedFold(NamedTuple):
    """A pair that is left alone.

    Attributes:
        linears: The layers that read one tensor.
        before: What its scales might have been folded into; None if there is nothing.
        reason: In words.
    """

    linears: Linears
    before: str | None
    reason: str

    def __str__(self) -> str:
        """Say all in one line."""
        into = f" into {self.before}" if self.before else ""
        return f"scales of {', '.join(self.linears)} cannot be folded{into}: {self.reason}"


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, stored as [out, in] or as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a weight of one dimension to multiply by."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 1


def linears_in(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block, by name."""
    return {name: module for name, module in block.named_modules() if is_linear(module)}


def norms_in(block: nn.Module) -> dict[str, nn.Module]:
    """Return the norms of a block, by name."""
    modules = block.named_modules()
    return {name: one for name, one in modules if is_norm(one) and not is_linear(one)}


class ObservedBlock:
    """What two runs of a block show.

    Attributes:
        block: The block.
        run: Runs it.
        layers: Its linear layers, by name.
        norms: Its norms, by name.
        shared: Modules that other blocks have too.
        record: What its modules are given.
        flow: What that is made of.
        reached: The linear layers that some tokens came to.
        wanted: Those that may be scaled.
        steady: Whether it returns the same bits when it is run again.
    """

    def __init__(
        self,
        block: nn.Module,
        run: Run,
        wanted: Collection[str] | None,
        shared: Collection[str],
        generator: torch.Generator,
    ) -> None:
        """Run the block; arguments are as in find_input_groups."""
        self.block = block
        self.run = run
        self.shared = set(shared)
        self.generator = generator
        modules = dict(block.named_modules())
        self.layers = linears_in(block)
        self.norms = norms_in(block)
        numbered = {
            name: module for name, module in modules.items() if name.rpartition(".")[2].isdecimal()
        }
        self.record = RecordedInputs(run, self.layers, self.norms | numbered)
        self.flow = DataFlow(block, self.layers.keys() | self.norms.keys())
        traced = self.flow.watch(run)
        self.steady = same(traced, self.record.result) or same(run(), self.record.result)
        self.reached = {
            name
            for name, inputs in self.record.inputs.items()
            if all(tensor.numel() for tensor in inputs)
        }
        if wanted is None:
            skipped = self.flow.choosers | self.record.crooked
            wanted = [name for name in self.layers if name not in skipped]
        self.wanted = list(wanted)

    def candidates(self, linears: Linears) -> tuple[list[InputGroup], list[RefusedFold]]:
        """Return the pairs that the flow allows, the module that was called last first.

        Args:
            linears: Layers that read one tensor.

        Returns:
            The pairs, and those that are refused.
        """
        reason = next(self._objections_to_layers(linears), None)
        if reason is not None:
            return [], [RefusedFold(linears, None, reason)]
        sources = self.flow.calls[linears[0]].sources
        found = []
        refused = []
        for source in sorted(sources, key=lambda name: -self.flow.calls[name].order):
            reason = next(self._objections_to_source(linears, source), None)
            offset = self._norm_offset(source) if reason is None else 0.0
            if offset is None:
                reason = "its weight enters its output neither as w nor as 1 + w"
            if reason is None:
                found.append(InputGroup(linears, source, offset or 0.0))
            else:
                refused.append(RefusedFold(linears, source, reason))
        return found, refused

    def _objections_to_layers(self, linears: Linears) -> Iterator[str]:
        """Yield why the input of some layers cannot be scaled."""
        if not self.steady:
            yield "the block returns other bits when it is run again"
        for name in linears:
            if name in self.shared:
                yield f"other blocks have {name} too"
            if name in self.record.crooked:
                yield f"{name} does more than multiply by its weight"
            if name in self.flow.choosers:
                yield f"{name} chooses what is computed, and would choose by other roundings"
        given = self.record.inputs[linears[0]]
        if not all(bool(tensor.isfinite().all()) for tensor in given):
            yield "what they read is not finite on these tokens"
        if not any(bool(tensor.any()) for tensor in given):
            yield "what they read is zero on these tokens"
        if not self.flow.calls[linears[0]].sources:
            yield "nothing in the block makes what they read"

    def _objections_to_source(self, linears: Linears, source: str) -> Iterator[str]:
        """Yield why a module cannot take the scales of some layers' input, as the flow tells."""
        width = self.record.inputs[linears[0]][0].shape[-1]
        gives = self.flow.calls[source].widths
        if source in self.shared:
            yield "other blocks have it too"
        if source in self.layers and source not in self.wanted:
            yield "it is not rounded"
        if source in self.record.crooked:
            yield "it does more than multiply by its weight"
        if any(given != width for given in gives):
            yield f"it gives {gives[0]} numbers for each token, and they read {width}"
        if source in self.norms and self.norms[source].get_parameter("weight").numel() != width:
            yield "its weight is shared by several parts of what they read"
        others = sorted(self.flow.readers[source] - set(linears))
        if others:
            yield f"what it gives is also read by {_some(others)}"
        if source in self.flow.leaving:
            yield "what it gives is part of what the block returns"
        if source in self.flow.escaping:
            yield "what it gives is kept for what runs after the block"

    def _norm_offset(self, name: str) -> float | None:
        """Return what a norm adds to its weight; None if that is neither 0 nor 1."""
        if name not in self.norms:
            return 0.0
        args, kwargs = self.record.arguments[name]
        return find_norm_offset(self.norms[name], args, kwargs, self.generator)


def _some(names: list[str]) -> str:
    """Return up to three names, and how many there are more."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
