"""What the linear layers of each block read, and what scales of that can be folded into."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from quantline.model.checkpoint import Checkpoint
from quantline.model.family import InputGroup
from quantline.model.structure import Structure

if TYPE_CHECKING:
    import torch

    from quantline.model.block_runner import BlockRun

NO_FOLD = "it is a layer that is not rounded"


def with_inputs(checkpoint: Checkpoint, tokens: np.ndarray) -> Structure:
    """Run a model block by block on a few tokens, and trace each block.

    Args:
        checkpoint: Of a model whose family has no table.
        tokens: int32 [1, length].

    Returns:
        Its structure, with the input groups of each block. Layers that are linear by their class
        alone are kept as they are: what they are given says nothing of how to round them.
    """
    import torch

    from quantline.model.block_runner import BlockRun
    from quantline.model.device import device
    from quantline.model.trace_inputs import shared_modules

    structure = checkpoint.structure
    assert structure is not None
    run = BlockRun(checkpoint, tokens)
    shared = shared_modules(run.blocks)
    inputs = []
    linears = []
    kept = set(structure.kept_linears)
    with torch.no_grad():
        for index in range(len(run.blocks)):
            with run.loaded(index):
                states = run.hidden[0].to(device())
                groups, unlike = _groups_of(run, index, states, shared[index])
                run.hidden[0] = run.call(index, 0, states).float().cpu()
            paths = structure.linears[index]
            inputs.append(groups)
            linears.append({name: path for name, path in paths.items() if name not in unlike})
            for name in unlike:
                kept |= {name, paths[name]}  # servers may look for either
    return replace(
        structure,
        inputs=tuple(inputs),
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
