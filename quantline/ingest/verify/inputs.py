"""What the linear layers of each block read, and what scales of that can be folded into."""

from typing import TYPE_CHECKING

import numpy as np

from quantline.model.checkpoint import Checkpoint
from quantline.model.family import InputGroup

if TYPE_CHECKING:
    import torch

    from quantline.model.block_runner import BlockRun

NO_FOLD = "it is a layer that is not rounded"


def find_inputs(checkpoint: Checkpoint, tokens: np.ndarray) -> tuple[tuple[InputGroup, ...], ...]:
    """Run a model block by block on a few tokens, and trace each block.

    Args:
        checkpoint: Of a model whose family has no table.
        tokens: int32 [1, length].

    Returns:
        For each block its input groups, by the checkpoint's names.
    """
    import torch

    from quantline.model.block_runner import BlockRun
    from quantline.model.device import device
    from quantline.model.trace_inputs import shared_modules

    run = BlockRun(checkpoint, tokens)
    shared = shared_modules(run.blocks)
    groups = []
    with torch.no_grad():
        for index in range(len(run.blocks)):
            with run.loaded(index):
                states = run.hidden[0].to(device())
                groups.append(_groups_of(run, index, states, shared[index]))
                run.hidden[0] = run.call(index, 0, states).float().cpu()
    return tuple(groups)


def _groups_of(
    run: "BlockRun", index: int, states: "torch.Tensor", shared: set[str]
) -> tuple[InputGroup, ...]:
    """Trace a loaded block on what enters it."""
    from quantline.model.trace_inputs import find_input_groups

    structure = run.arch.structure
    assert structure is not None
    start = f"{run.parts.block_path(index)}."
    names = {path.removeprefix(start): name for name, path in structure.linears[index].items()}
    if not names:
        return ()

    def call() -> list["torch.Tensor"]:
        out = run.call(index, 0, states)
        return [out, *(tensor for state in run.shared(0) for tensor in state.written())]

    traced = find_input_groups(run.blocks[index], call, names, shared)
    return tuple(_by_name(group, names, start, run) for group in traced.groups)


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
