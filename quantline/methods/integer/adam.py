"""Adam (Kingma and Ba 2015, algorithm 1) by torch's function.

The class `torch.optim.Adam` has the same numbers, and imports torch's compiler for a second when it
is made.
"""

from typing import NamedTuple

import torch
from torch.optim import adam

DECAYS = (0.9, 0.999)  # of the means of gradients and of their squares


class Moments(NamedTuple):
    """What Adam remembers of a tensor, in its shape.

    Attributes:
        mean: Of the gradients.
        square: Mean of their squares.
    """

    mean: torch.Tensor
    square: torch.Tensor

    @classmethod
    def zeros(cls, moved: torch.Tensor) -> "Moments":
        """Return those of a tensor that has not moved yet."""
        return cls(torch.zeros_like(moved), torch.zeros_like(moved))


def move(
    moved: torch.Tensor,
    moments: Moments,
    gradient: torch.Tensor,
    step: int,
    rate: float,
    epsilon: float = 1e-8,
) -> None:
    """Take one step.

    Args:
        moved: float32; it changes in place.
        moments: Of it; they change in place.
        gradient: By it, in its shape.
        step: Its number, from 1.
        rate: About how far it goes.
        epsilon: Added to the root of the mean square.
    """
    adam.adam(
        [moved],
        [gradient],
        [moments.mean],
        [moments.square],
        [],
        [torch.tensor(step - 1.0)],
        amsgrad=False,
        beta1=DECAYS[0],
        beta2=DECAYS[1],
        lr=rate,
        weight_decay=0,
        eps=epsilon,
        maximize=False,
    )
