"""Which experiments a sweep is, before any of them runs."""

import pytest

from quantline.errors import ConfigError
from quantline.sweeps.plan import Plan, label_of, make_plan, sweep_name
from quantline.sweeps.space import read_space
from tests.helpers.project import ROOT


def plan(*overrides: str) -> Plan:
    space = read_space(["suite=quick", *overrides])
    return make_plan(space, space.choices(), ROOT)


def test_plan_names_experiments_by_what_differs_and_measures_what_changes():
    made = plan("recipes.gptq.bits=3,4", "seed=0")
    assert [point.label for point in made.points] == ["gptq-bits3", "gptq-bits4"]
    assert made.variants == ("gptq-w4g128",)  # also where one is what the suite has
    assert made.shares_calibration
    assert made.points[0].composed["recipes"]["gptq-w4g128"]["bits"] == 3
    assert made.points[0].overrides[-1] == "recipes.gptq-w4g128.bits=3"
    assert made.base.recipes["gptq-w4g128"].model_dump()["bits"] == 4


def test_plan_of_another_calibration_measures_every_variant():
    made = plan("calibration.sequences=8,16")
    assert len(made.variants) == 4
    assert not made.shares_calibration
    assert len({point.calibration_key for point in made.points}) == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target=any,edge"], "another target"),
        (["evaluation.sequences=4,8"], "another evaluation"),
        (["recipes.gptq.bits=3,400"], "experiment gptq-bits400: "),
        (["recipes.awq.bits=3,4"], "no such entry"),
        (["model=local", "model.path=/nowhere", "recipes.gptq.bits=3,4"], "there is no /nowhere"),
    ],
)
def test_plan_refuses_before_anything_runs(overrides, words):
    with pytest.raises(ConfigError, match=words):
        plan(*overrides)


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["recipes.gptq.bits=2,3", "recipes.gptq.group_size=32,128"], "gptq-bits2-group_size32"),
        (["recipes.gptq.bits=2,3", "recipes.awq.bits=3,4"], "gptq-bits2-awq-bits3"),
        (["recipes.*.bits=2,3"], "bits2"),
        (["recipes.gptq.damping=0.01,0.1"], "gptq-damping0_01"),
        (["suite=quick,full"], "suite-quick"),
        (["calibration.path='a b/c',d"], "patha_b_c"),
    ],
)
def test_label_is_a_name_that_git_takes(overrides, label):
    space = read_space(overrides)
    assert label_of(space, next(space.choices())) == label


def test_label_of_many_values_is_cut_and_stays_apart():
    space = read_space([f"recipes.gptq.{'option' * 9}{number}=1,2" for number in range(4)])
    labels = {label_of(space, choice) for choice in space.choices()}
    assert len(labels) == 16
    assert max(map(len, labels)) <= 100


def test_sweep_name_says_what_varies():
    space = read_space(["recipes.gptq.bits=2,3", "recipes.gptq.group_size=32,128"])
    assert sweep_name(space) == "gptq-bits-group_size"
