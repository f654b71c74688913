"""No step sees what is held out, and each set of sequences comes once before any comes again."""

import numpy as np
import pytest

from quantline.config.refinement import Refinement
from quantline.recipes.refinement.schedule import Schedule, make_schedule

TOKENS = np.arange(40, dtype=np.int32)[:, None] * np.ones(3, np.int32)  # sequence n is n, n, n


def schedule(steps: int = 9, sequences: int = 4, seed: int = 0, most_rows: int = 16) -> Schedule:
    return make_schedule(TOKENS, Refinement(steps=steps, sequences=sequences), seed, most_rows)


def seen(made: Schedule, numbers: list[int]) -> list[int]:
    """Return the sequences of some batches."""
    batches = [made.tokens[start : start + made.rows] for start in range(0, 40, made.rows)]
    return [int(row[0]) for number in numbers for row in batches[number]]


def test_make_schedule_holds_out_an_eighth():
    made = schedule(steps=40)
    held = seen(made, made.held_out)
    stepped = {number for step in made.steps for number in seen(made, step)}
    assert len(held) == 5 and not stepped & set(held)
    assert len(stepped) == 32  # of 35, the last three fill no step


def test_make_schedule_gives_all_sets_before_any_comes_again():
    made = schedule(steps=19, sequences=4)  # eight sets
    sets = [tuple(seen(made, step)) for step in made.steps]
    assert all(len(of) == 4 for of in sets)
    assert len(set(sets[:8])) == len(set(sets[8:16])) == 8
    assert sets[8:16] != sets[:8]


def test_make_schedule_embeds_only_what_steps_see():
    made = schedule(steps=2)
    assert len(made.tokens) == 2 * 4 + 5


def test_make_schedule_goes_by_its_seed():
    assert np.array_equal(schedule().tokens, schedule().tokens)
    assert not np.array_equal(schedule().tokens, schedule(seed=1).tokens)


@pytest.mark.parametrize(("most_rows", "rows"), [(1, 1), (3, 3), (4, 3), (6, 6), (100, 6)])
def test_make_schedule_cuts_a_step_into_equal_batches(most_rows, rows):
    made = schedule(steps=3, sequences=6, most_rows=most_rows)
    assert made.rows == rows
    assert all(len(seen(made, step)) == 6 for step in made.steps)
    assert len(seen(made, made.held_out)) == 5


def test_make_schedule_holds_out_one_of_the_fewest_sequences():
    made = make_schedule(TOKENS[:5], Refinement(steps=3, sequences=4), 0, 16)
    assert len(made.tokens) == 5
    assert made.steps == [[0], [0], [0]] and made.held_out == [1]
