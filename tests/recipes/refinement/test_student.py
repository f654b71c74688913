"""The student's weights are what the store's integers stand for, with scales and norms moved."""

import ml_dtypes
import numpy as np
import pytest
import torch

from quantline.model.checkpoint import Checkpoint
from quantline.recipes.refinement.student import NORMS, scales_as_stored
from tests.helpers.quantized import rounded
from tests.helpers.refinement import move_by, random_changes, student_of

LAYER = "model.layers.1.mlp.down_proj"
NORM = "model.layers.0.input_layernorm.weight"
BEFORE_LAYER = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_model) -> Checkpoint:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    return Checkpoint(make_model(tmp_path_factory.mktemp("student") / "model", **sizes))


@pytest.fixture
def student(checkpoint, tmp_path):
    changed = {BEFORE_LAYER: checkpoint.tensor(BEFORE_LAYER) / np.float32(3)}
    weights = rounded(tmp_path / "rounded", checkpoint, bits=2, overrides=changed)
    return student_of(checkpoint, weights, tmp_path)


def test_student_has_the_rounded_model_before_the_first_step(student, checkpoint):
    for stored in (False, True):
        student.stored = stored
        assert np.array_equal(
            student[f"{LAYER}.weight"].numpy(), student.rounded.linear(LAYER).dequantize()
        )
        assert np.array_equal(student[NORM].numpy(), checkpoint.tensor(NORM))
        override = student.rounded.override(BEFORE_LAYER)
        assert np.array_equal(student[BEFORE_LAYER].numpy(), override)
    assert "model.embed_tokens.weight" not in student
    assert student.part_of["model.norm.weight"] == NORMS
    assert sorted(student) == sorted(
        {f"{name}.weight" for name in checkpoint.arch.linears()}
        | {name for name in checkpoint.names if name.endswith("norm.weight")}
    )


def test_student_moves_scales_by_shares_and_norms_by_what_is_added(student, checkpoint):
    changes = random_changes(student, 0.1)
    move_by(student, changes)
    linear = student.rounded.linear(LAYER)
    grown = 1 + changes[LAYER].numpy().repeat(linear.group_size, 1)
    np.testing.assert_allclose(
        student[f"{LAYER}.weight"].numpy(), linear.dequantize() * grown, rtol=1e-6
    )
    weight = torch.from_numpy(checkpoint.tensor(NORM))
    torch.testing.assert_close(student[NORM], weight + changes[NORM])


def test_student_as_stored_has_scales_of_bfloat16_and_norms_in_the_type_of_the_source(student):
    move_by(student, random_changes(student, 0.1))
    student.stored = True
    for name, values in [(LAYER, student.scales(LAYER)), (NORM, student.norm(NORM))]:
        halves = values.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
        assert np.array_equal(values.numpy(), halves), name
    student.stored = False
    assert not torch.equal(student.scales(LAYER), student.scales(LAYER).bfloat16().float())


def test_scales_as_stored_are_in_float16_where_they_were():
    before = torch.tensor([2.0**-24, 2.0**-24, 1.0, 2.0**-40])
    moved = torch.tensor([1.25 * 2.0**-24, 2.0**-23, 1.1, 1.25 * 2.0**-40])
    stored = scales_as_stored(moved, before)
    # The first would be none of float16's, of which the last has been none before.
    assert stored.tolist() == [2.0**-24, 2.0**-23, torch.tensor(1.1).bfloat16().item(), moved[3]]
