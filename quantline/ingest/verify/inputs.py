"""What the linear layers of each block read, and what scales of that can be folded into."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from quantline.model.family import InputGroup
from quantline.model.structure import Structure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from quantline.model.block_runner import BlockRun

NO_FOLD = "it is a layer that is not rounded"


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

    @contextmanager
    def watch(self, linears: dict[str, "nn.Linear"], block: "nn.Module") -> Iterator[None]:
        """Trace a loaded block on the first batch (see BlockRun.forward)."""
        from quantline.model.device import device

        index = len(self.inputs)
        states = self.run.hidden[0].to(device())
        groups, unlike = _groups_of(self.run, index, states, self.shared[index])
        self.inputs.append(groups)
        self.unlike.append(list(unlike))
        yield

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


def _groups_of(
    run: "BlockRun", index: int, states: "torch.Tensor", shared: set[str]
) -> tuple[tuple[InputGroup, ...], set[str]]:
    """Trace a loaded block on what enters it.

    Returns:
        The groups, and the layers that are linear by their class alone.
    """
    from quantline.model.trace_inputs import find_input_groups

    structure = run.arch.structure
    assert structure is not None
    start = f"{run.parts.block_path(index)}."
    names = {path.removeprefix(start): name for name, path in structure.linears[index].items()}
    if not names:
        return (), set()

    def call() -> list["torch.Tensor"]:
        out = run.call(index, 0, states)
        return [out, *(tensor for state in run.shared(0) for tensor in state.written())]

    traced = find_input_groups(run.blocks[index], call, names, shared)
    unlike = {names[path] for path in traced.unlike_linear} - structure.experts_of_layers.keys()
    groups = []
    for traced_group in traced.groups:
        group = _by_name(traced_group, names, start, run)
        rounded = tuple(name for name in group.linears if name not in unlike)
        if rounded:
            groups.append(group._replace(linears=rounded))
    return tuple(groups), unlike


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
