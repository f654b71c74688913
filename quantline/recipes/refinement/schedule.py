"""Which sequences of the calibration text each step sees, how far it goes, and what is held out."""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np

from quantline.config.refinement import Refinement

# Of the text, on which the divergence before and after is measured, and of which no step sees any.
HELD_OUT_SHARE = 8
MOST_HELD_OUT = 16


@dataclass(frozen=True)
class Schedule:
    """The steps of a refinement.

    Attributes:
        tokens: int32 [sequences, length], those of the steps and then those that are held out.
        rows: Sequences in a batch.
        steps: For each step the numbers of its batches.
        held_out: The numbers of the batches that are held out.
        rates: For each step its learning rate.
    """

    tokens: np.ndarray
    rows: int
    steps: list[list[int]]
    held_out: list[int]
    rates: list[float]


def make_schedule(tokens: np.ndarray, options: Refinement, seed: int, most_rows: int) -> Schedule:
    """Return the steps of a refinement.

    The text is shuffled. Every step takes the next sequences; once all have been taken, the same
    sets come again, in another order.

    Args:
        tokens: Of the calibration, int32 [sequences, length].
        options: Of the recipe; there have to be more sequences than a step takes.
        seed: Of the order.
        most_rows: Sequences that run at once at most.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    size = options.sequences
    held = held_out_sequences(len(tokens), size)
    order = generator.permutation(len(tokens))
    sets = min((len(tokens) - held) // size, options.steps)
    rows = next(number for number in range(min(size, most_rows), 0, -1) if size % number == 0)
    used = np.concatenate([order[: sets * size], order[len(tokens) - held :]])
    in_set = size // rows
    chosen: list[int] = []
    while len(chosen) < options.steps:
        chosen += range(sets) if not chosen else generator.permutation(sets).tolist()
    return Schedule(
        tokens[used],
        rows,
        [
            list(range(number * in_set, (number + 1) * in_set))
            for number in islice(chosen, options.steps)
        ],
        list(range(sets * in_set, -(-len(used) // rows))),
        [cosine(options.learning_rate, step, options.steps) for step in range(options.steps)],
    )


def held_out_sequences(sequences: int, in_step: int) -> int:
    """Return how many sequences of a text no step sees.

    Args:
        sequences: Of the text, more than `in_step`.
        in_step: Those that a step takes.
    """
    return min(max(1, sequences // HELD_OUT_SHARE), MOST_HELD_OUT, sequences - in_step)


def cosine(rate: float, step: int, steps: int) -> float:
    """Return the rate of a step, counted from 0: the first has all of it, one past the end none."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2
