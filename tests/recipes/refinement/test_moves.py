"""Adam's steps are those of torch.optim."""

import pytest
import torch

from quantline.recipes.refinement import moves
from quantline.recipes.refinement.moves import at_rest, move
from quantline.recipes.refinement.schedule import cosine


def gradients(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e2])


def test_move_is_torchs_adam_with_torchs_cosine():
    steps = 6
    parameter = torch.nn.Parameter(torch.zeros(5, 3))
    optimizer = torch.optim.Adam([parameter], lr=0.01, eps=moves.EPSILON)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    moved = at_rest(gradients(0))
    for step in range(steps):
        parameter.grad = gradients(step)
        optimizer.step()
        schedule.step()
        moved = move(moved, gradients(step), step + 1, cosine(0.01, step, steps))
        torch.testing.assert_close(moved.change, parameter.detach(), rtol=1e-5, atol=1e-8)


def test_move_leaves_what_has_no_gradient():
    nothing = torch.zeros(4)
    assert move(at_rest(nothing), nothing, 1, 0.1).change.equal(nothing)


def test_move_goes_as_far_for_tiny_gradients():
    """In a large model the gradient at a single scale is tiny."""
    tiny = torch.tensor([1e-12, -1e-12])
    assert move(at_rest(tiny), tiny, 1, 0.1).change.tolist() == pytest.approx([-0.1, 0.1], rel=0.01)


def test_move_never_turns_a_scale_around():
    moved = at_rest(torch.zeros(2))
    for step in range(1, 30):
        moved = move(moved, torch.tensor([1.0, -1.0]), step, 0.1)
    assert moved.change.tolist() == [moves.LEAST, moves.MOST]
    assert moves.LEAST > -1


def test_cosine_begins_with_the_rate_and_ends_before_nothing():
    rates = [cosine(0.4, step, 4) for step in range(5)]
    assert rates[0] == 0.4 and rates[2] == pytest.approx(0.2) and rates[4] == pytest.approx(0)
    assert sorted(rates, reverse=True) == rates
