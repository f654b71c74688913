"""Adam on tensors: Kingma and Ba 2015, algorithm 1.

torch.optim's has the same numbers, and imports torch's compiler for seconds when it is made.
"""

from typing import NamedTuple

import torch

DECAYS = (0.9, 0.999)  # of the means of gradients and of their squares
# Gradients of single scales are tiny in large models. One without any gradient stays where it is.
EPSILON = 1e-15
# Of a change: a scale that were zero or negative would be no scale.
LEAST = -0.5
MOST = 1.0


class Moved(NamedTuple):
    """What moves, and what Adam remembers of it: three tensors of one shape, float32.

    Attributes:
        change: By how much it has moved.
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
    first, second = DECAYS
    mean = first * moved.mean + (1 - first) * gradient
    square = second * moved.square + (1 - second) * gradient * gradient
    size = (square / (1 - second**step)).sqrt() + EPSILON
    change = moved.change - rate / (1 - first**step) * mean / size
    return Moved(change.clamp(LEAST, MOST), mean, square)
