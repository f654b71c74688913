"""What was found of one block is so of another only if that shows it by itself."""

import pytest
import torch
from torch import nn

from quantline.model.block_calls import Call
from quantline.model.like_blocks import Form, holds_likewise
from quantline.model.trace_inputs import find_input_groups
from tests.helpers.traced_blocks import WIDTH, Norm

CALL = Call(0, (None, torch.ones(2, 2)), {"past": None})


class Block(nn.Module):
    """A gated block; `odd` names what only this one of the blocks does, without saying so."""

    odd: str | None = None

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm = Norm()
        self.gate = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        read = self.norm(x)
        up = self.up(x if self.odd == "reads other" else read)
        if self.odd == "clamps":
            up = up.clamp(-0.05, 0.05)
        out = x + self.down(nn.functional.silu(self.gate(read)) * up)
        return out + read if self.odd == "reads again" else out


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(6, WIDTH)


@pytest.mark.parametrize(
    ("odd", "holds"),
    [(None, True), ("reads other", False), ("reads again", False), ("clamps", False)],
)
def test_holds_likewise_tests_every_block_by_itself(tokens, odd, holds):
    first = Block(0)
    traced = find_input_groups(first, lambda: first(tokens))
    assert traced.shown is not None
    other = Block(1)
    other.odd = odd
    before = [parameter.clone() for parameter in other.parameters()]
    found = holds_likewise(other, lambda: other(tokens), traced.groups, traced.shown)
    assert found is holds
    after = list(other.parameters())
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_holds_likewise_compares_what_layers_read_where_nothing_can_be_folded(tokens):
    first = Block(0)
    traced = find_input_groups(first, lambda: first(tokens))
    assert traced.shown is not None
    groups = [traced.groups[0]._replace(before=None), *traced.groups[1:]]
    other = Block(1)
    assert holds_likewise(other, lambda: other(tokens), groups, traced.shown)
    other.odd = "reads other"
    assert not holds_likewise(other, lambda: other(tokens), groups, traced.shown)


def test_holds_likewise_asks_whether_a_block_returns_the_same_bits(tokens):
    first = Block(0)
    traced = find_input_groups(first, lambda: first(tokens))
    assert traced.shown is not None
    calls = iter(range(10))
    groups = [group._replace(before=None) for group in traced.groups]
    assert holds_likewise(first, lambda: first(tokens), groups, traced.shown)
    assert not holds_likewise(first, lambda: first(tokens) + next(calls), groups, traced.shown)


def test_find_input_groups_shows_nothing_of_layers_that_no_token_came_to(tokens):
    block = Block(0)
    traced = find_input_groups(block, lambda: block.gate(tokens), ("gate", "up", "down"))
    assert traced.shown is None


def test_form_is_alike_but_for_the_number_of_the_block():
    first = Form(Block(0), 0, CALL)
    assert Form(Block(3), 3, CALL).is_like(first)
    assert not Form(Block(4), 3, CALL).is_like(first)  # an attribute that is no number of its block


@pytest.mark.parametrize("change", ["attribute", "module", "shape", "argument"])
def test_form_tells_blocks_apart(change):
    other = Block(1)
    call = CALL
    if change == "attribute":
        other.window = 8
    elif change == "module":
        other.norm = nn.RMSNorm(WIDTH)
    elif change == "shape":
        other.up = nn.Linear(WIDTH, WIDTH, bias=False)
    else:
        call = Call(0, (None, torch.ones(2, 3)), {"past": None})
    assert not Form(other, 1, call).is_like(Form(Block(0), 0, CALL))
