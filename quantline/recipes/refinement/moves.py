"""How far scales and norms have moved, and one step further by Adam."""

from typing import NamedTuple

import torch

from quantline.methods.integer import adam

# Gradients of single scales are tiny in large models. One without any gradient stays where it is.
EPSILON = 1e-15
# A scale that were zero or negative would be no scale.
LEAST = -0.5
MOST = 1.0


class Moved(NamedTuple):
    """What moves, and what Adam remembers of it: three tensors of one shape, float32.

    Attributes:
        change: By how much it has moved: a scale as a share of its size, a norm by what is added.
        mean: Of the gradients.
        square: Mean of their squares.
    """

    change: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor


def at_rest(gradient: torch.Tensor) -> Moved:
    """Return what has not moved yet, in the shape of a gradient."""
    return Moved(*(torch.zeros_like(gradient) for _ in Moved._fields))


def move(moved: Moved, gradient: torch.Tensor, step: int, rate: float) -> Moved:
    """Take one step.

    Args:
        moved: Before it.
        gradient: By the change.
        step: Its number, from 1.
        rate: About how far it goes.
    """
    after = Moved(*(tensor.clone() for tensor in moved))
    moments = adam.Moments(after.mean, after.square)
    adam.move(after.change, moments, gradient, step, rate, EPSILON)
    after.change.clamp_(LEAST, MOST)
    return after
