"""What tracing finds in a family's blocks is what its table says."""

from functools import partial

import torch

from quantline.model.block_runner import BlockRun
from quantline.model.device import device
from quantline.model.family import InputGroup
from quantline.model.trace_inputs import TracedInputs, find_input_groups
from tests.helpers.families import FamilyModel


def traced_blocks(family: FamilyModel) -> list[TracedInputs]:
    run = BlockRun(family.checkpoint, family.tokens[:2, :12])
    found = []
    for index in range(family.arch.layers):
        prefix = family.arch.prefix(index)
        names = [name.removeprefix(prefix) for name in family.arch.linears_of(index)]
        states = run.hidden[0].to(device())
        with run.loaded(index) as (_, block), torch.no_grad():
            call = partial(run.call, index, 0, states)
            found.append(find_input_groups(block, call, names))
            run.hidden[0] = call().cpu()
    return found


def test_find_input_groups_finds_what_the_table_says(family):
    for index, traced in enumerate(traced_blocks(family)):
        prefix = family.arch.prefix(index)
        expected = {}
        for group in family.arch.input_groups(index):
            linears = tuple(name.removeprefix(prefix) for name in group.linears)
            before = group.before.removeprefix(prefix) if group.before else None
            expected[linears] = InputGroup(linears, before, group.norm_offset)
        found = {group.linears: group._replace(reason="") for group in traced.groups}
        assert found == expected
        assert all(bool(group.reason) == (group.before is None) for group in traced.groups)
