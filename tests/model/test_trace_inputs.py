"""What feeds what in a block, found by running it; and what looks like a pair, and is none."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantline.model.family import InputGroup
from quantline.model.fold_test import FoldTest
from quantline.model.trace_inputs import TracedInputs, find_input_groups, shared_modules
from tests.helpers.traced_blocks import (
    INNER,
    TOKENS,
    WIDTH,
    Attention,
    BentExpert,
    Block,
    Clamped,
    Copied,
    Kept,
    Loud,
    Mixture,
    Normalized,
    Numbered,
    ReadByConvolution,
    ReadElsewhere,
    ReadInVain,
    Sorting,
    Untraceable,
    UsedTwice,
    Written,
)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def tokens() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def runner(block: nn.Module) -> Callable[[], torch.Tensor]:
    states = tokens()
    return lambda: block(states)


def trace(block: nn.Module, **options) -> TracedInputs:
    return find_input_groups(block, runner(block), **options)


def pairs(traced: TracedInputs) -> dict[tuple[str, ...], str | None]:
    return {group.linears: group.before for group in traced.groups}


def reason(traced: TracedInputs, *linears: str) -> str:
    """Return why the last pair of these layers was refused."""
    return [refused.reason for refused in traced.refused if refused.linears == linears][-1]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_find_input_groups_of_a_gated_block(offset):
    block = Block(offset)
    assert trace(block)._replace(shown=None) == TracedInputs(
        [
            InputGroup(("gate", "up"), "norm", offset),
            InputGroup(("down",), "up"),
        ],
        [],
        {},
    )


def test_find_input_groups_leaves_the_weights_as_they_are():
    block = Attention(4)
    before = {name: (one, one.detach().clone()) for name, one in block.named_parameters()}
    trace(block)
    for name, parameter in block.named_parameters():
        original, values = before[name]
        assert parameter is original and torch.equal(parameter, values)
    assert not any(module._forward_hooks for module in block.modules())
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_find_input_groups_sees_through_views_and_copies_but_not_through_writing():
    assert pairs(trace(Copied())) == {("gate", "up"): "norm", ("down",): "up"}
    written = trace(Written())
    assert pairs(written) == {("gate",): None, ("up",): None, ("down",): "up"}
    assert reason(written, "gate") == "what it gives is also read by up"


def test_find_input_groups_folds_into_values_where_each_head_has_its_own():
    assert trace(Attention(4)).groups == [
        InputGroup(("q", "k", "v"), "norm", 1.0),
        InputGroup(("o",), "v"),
    ]
    shared = trace(Attention(2))
    assert pairs(shared)["o",] is None
    reasons = {refused.before: refused.reason for refused in shared.refused}
    assert reasons["v"] == "it gives 8 numbers for each token, and they read 16"
    assert shared.groups[1].reason == "; ".join(
        f"{before}: {why}" for before, why in reasons.items()
    )
    assert reasons["q"] == "what they read is not what it gives, number by number"


@pytest.mark.parametrize(
    ("kind", "linears", "words"),
    [
        (Clamped, ("down",), "what they read is not what it gives, number by number"),
        (Normalized, ("down",), "what they read is not what it gives, number by number"),
        (ReadElsewhere, ("gate", "up"), "what it gives is part of what the block returns"),
        (ReadByConvolution, ("gate", "up"), "what it gives is also read by convolution"),
        (ReadInVain, ("gate", "up"), "what it gives is also read by side"),
        (Kept, ("down",), "what it gives is kept for what runs after the block"),
        (UsedTwice, ("down",), "scaling both changes what the block returns"),
        (Loud, ("gate", "up"), "the block returns other bits when it is run again"),
    ],
)
def test_find_input_groups_refuses_what_is_no_pair(kind, linears, words):
    traced = trace(kind())
    assert pairs(traced)[linears] is None
    refused = {refused.before: refused.reason for refused in traced.refused}
    assert words in (refused.get("norm"), refused.get("up"), refused.get(None))


def test_find_input_groups_tries_what_the_flow_lets_through():
    """Without what the flow tells, the trial alone refuses planted pairs."""
    for block, pair in (
        (ReadElsewhere(), InputGroup(("gate", "up"), "norm")),
        (ReadByConvolution(), InputGroup(("gate", "up"), "norm")),
        (Block(), InputGroup(("down",), "gate")),
        (Block(1.0), InputGroup(("gate", "up"), "norm", 0.0)),
        (Block(0.0), InputGroup(("gate", "up"), "norm", 1.0)),
        (Block(), InputGroup(("gate",), "norm")),
        (Attention(4), InputGroup(("o",), "k")),
        (UsedTwice(), InputGroup(("down",), "up")),
        (Mixture(sends=False), InputGroup(("experts.0.gate", "experts.0.up"), "norm")),
    ):
        test = FoldTest(block, runner(block), {"norm"}, torch.Generator().manual_seed(0))
        assert not test.holds([pair]), pair
    block = Block(1.0)
    good = [InputGroup(("gate", "up"), "norm", 1.0), InputGroup(("down",), "up")]
    test = FoldTest(block, runner(block), {"norm"}, torch.Generator().manual_seed(0))
    assert test.passing([*good, InputGroup(("down",), "gate")]) == good


def test_find_input_groups_never_scales_what_a_router_reads():
    """Also where every expert reads the router's very tensor, and scaling would pass the trial."""
    for sends in (True, False):
        traced = trace(Mixture(sends=sends))
        found = pairs(traced)
        assert not any("router" in linears for linears in found)
        assert "norm" not in found.values()
        assert any("router" in str(refused) for refused in traced.refused if refused.before)
    with_router = trace(Mixture(), linears=["router", "experts.0.up"])
    assert pairs(with_router)["router",] is None
    assert "chooses what is computed" in reason(with_router, "router")


def test_find_input_groups_tries_experts_that_no_token_came_to_by_themselves():
    expected: dict[tuple[str, ...], str | None] = {}
    for number in range(4):
        both = (f"experts.{number}.gate", f"experts.{number}.up")
        expected |= {both: None, (f"experts.{number}.down",): both[1]}
    mixture = Mixture()
    traced = trace(mixture)
    assert pairs(traced) == expected
    words = "there is nothing for the layers of experts.0 either"
    assert reason(traced, "experts.3.gate", "experts.3.up") == words
    mixture.experts[3] = BentExpert()
    traced = trace(mixture)
    assert pairs(traced) == expected | {("experts.3.down",): None}
    assert reason(traced, "experts.3.down") == "scaling both changes what experts.3 returns"
    assert traced.unlike_linear == {}
    mixture.experts[0].gate = Numbered()
    traced = trace(mixture)
    assert pairs(traced)["experts.0.gate.1",] is None
    assert "experts.0.gate.1" not in traced.unlike_linear  # an expert that no token came to


def test_find_input_groups_tells_of_layers_that_are_none():
    block = Block()
    block.register_module("bare", nn.Linear(WIDTH, WIDTH))
    block.up = Sorting(WIDTH, INNER)
    linears = ["gate", "up", "down", "bare"]
    traced = trace(block, linears=linears)
    assert traced.unlike_linear == {
        "up": "it does more than multiply by its weight",
        "bare": "it was not called",
    }
    assert sorted(name for group in traced.groups for name in group.linears) == sorted(linears)
    assert not any(group.before for group in traced.groups)
    assert "up" not in str(pairs(trace(block)))


def test_find_input_groups_scales_no_layer_that_is_not_rounded():
    block = Block()
    assert pairs(trace(block, linears=["up", "down"])) == {("up",): None, ("down",): "up"}
    traced = trace(block, linears=["gate", "down"])
    assert pairs(traced) == {("gate",): None, ("down",): None}
    assert {refused.before for refused in traced.refused} == {"norm", "up", "gate"}


def test_find_input_groups_scales_no_module_that_other_blocks_have():
    first = Block()
    second = Block()
    second.up = first.up
    names = shared_modules([first, second, Block()])
    assert names == [{"up"}, {"up"}, set()]
    traced = trace(first, shared=names[0])
    assert pairs(traced) == {("gate", "up"): None, ("down",): None}
    assert reason(traced, "gate", "up") == "other blocks have up too"


def test_find_input_groups_says_what_cannot_be_followed():
    traced = trace(Untraceable())
    assert pairs(traced) == {("gate",): None, ("up",): None, ("down",): None}
    assert "RuntimeError: no mode can be active here" in reason(traced, "down")
    assert str(traced.refused[0]).startswith("scales of gate cannot be folded: its tensors cannot")
