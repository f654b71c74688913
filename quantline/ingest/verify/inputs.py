"""What the linear layers of each block read, and what scales of that can be folded into."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from quantline.model.family import InputGroup
from quantline.model.structure import Structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantline.model.block_runner import BlockRun
    from quantline.model.like_blocks import Form
    from quantline.model.trace_inputs import TracedInputs

NO_FOLD = "it is a layer that is not rounded"


class _Known(NamedTuple):
    """A block that was traced: how it is built, its layers that are rounded, what was found."""

    form: "Form"
    linears: tuple[str, ...]
    shared: set[str]
    traced: "TracedInputs"


class InputTracer:
    """Traces each block of a run before it runs.

    Attributes:
        inputs: For each block that was traced, its input groups.
        unlike: For each, the layers that are linear by their class alone: what they are given says
            nothing of how to round them.
    """

    def __init__(self, run: "BlockRun") -> None:
        """Trace the blocks of a run; `watch` goes to its `forward`."""
        from quantline.model.trace_inputs import shared_modules

        self.run = run
        self.shared = shared_modules(run.blocks)
        self.inputs: list[tuple[InputGroup, ...]] = []
        self.unlike: list[list[str]] = []
        self._known: list[_Known] = []

    @contextmanager
    def watch(self, linears: dict[str, "nn.Linear"], block: "nn.Module") -> Iterator[None]:
        """Trace a loaded block on the first batch (see BlockRun.forward)."""
        from quantline.model.device import device

        states = self.run.hidden[0].to(device())
        groups, unlike = self._groups_of(len(self.inputs), states)
        self.inputs.append(groups)
        self.unlike.append(list(unlike))
        yield

    def _groups_of(
        self, index: int, states: "torch.Tensor"
    ) -> tuple[tuple[InputGroup, ...], set[str]]:
        """Trace a loaded block on what enters it.

        Returns:
            The groups, and the layers that are linear by their class alone.
        """
        run = self.run
        structure = run.arch.structure
        assert structure is not None
        start = f"{run.parts.block_path(index)}."
        names = {path.removeprefix(start): name for name, path in structure.linears[index].items()}
        if not names:
            return (), set()

        def call() -> list["torch.Tensor"]:
            out = run.call(index, 0, states)
            return [out, *(tensor for state in run.shared(0) for tensor in state.written())]

        traced = self._traced(index, call, tuple(names))
        experts = structure.experts_of_layers.keys()
        unlike = {names[path] for path in traced.unlike_linear} - experts
        groups = []
        for traced_group in traced.groups:
            group = _by_name(traced_group, names, start, run)
            rounded = tuple(name for name in group.linears if name not in unlike)
            if rounded:
                groups.append(group._replace(linears=rounded))
        return tuple(groups), unlike

    def _traced(
        self, index: int, call: "Callable[[], list[torch.Tensor]]", linears: tuple[str, ...]
    ) -> "TracedInputs":
        """Trace a block, or show that what was found of one like it is so of this one."""
        from quantline.model.like_blocks import Form, holds_likewise
        from quantline.model.trace_inputs import find_input_groups

        block = self.run.blocks[index]
        shared = self.shared[index]
        form = Form(block, index, self.run.call_of(index, 0))
        for known in self._known:
            traced = known.traced
            if (known.linears, known.shared) != (linears, shared) or not form.is_like(known.form):
                continue
            if traced.shown and holds_likewise(block, call, traced.groups, traced.shown):
                return traced
        traced = find_input_groups(block, call, linears, shared)
        self._known.append(_Known(form, linears, shared, traced))
        return traced

    def structure(self, structure: Structure) -> Structure:
        """Return a structure with what was found; layers that are unlike others are kept."""
        linears = []
        kept = set(structure.kept_linears)
        for paths, unlike in zip(structure.linears, self.unlike, strict=True):
            linears.append({name: path for name, path in paths.items() if name not in unlike})
            for name in unlike:
                kept |= {name, paths[name]}  # servers may look for either
        return replace(
            structure,
            inputs=tuple(self.inputs),
            linears=tuple(linears),
            kept_linears=tuple(sorted(kept)),
        )


def _by_name(group: InputGroup, names: dict[str, str], start: str, run: "BlockRun") -> InputGroup:
    """Return a group with the checkpoint's names in the place of paths inside the block."""
    before, reason = None, group.reason
    if group.before is not None:
        weight = run.parts.names.get(f"{start}{group.before}.weight")
        is_norm = weight is not None and len(run.checkpoint.shape(weight)) == 1
        if group.before in names or is_norm:
            assert weight is not None
            before = weight.removesuffix(".weight")
        else:
            reason = f"{group.before}: {NO_FOLD}"
    linears = tuple(names[linear] for linear in group.linears)
    return InputGroup(linears, before, group.norm_offset, reason)
