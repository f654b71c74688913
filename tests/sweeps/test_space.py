"""What a sweep varies, as it is typed."""

import pytest

from quantline.errors import ConfigError
from quantline.sweeps.space import Interval, matching, name_entries, read_space
from tests.helpers.project import ROOT

RECIPES = {
    "gptq-w4g128": {"method": "gptq", "bits": 4},
    "gptq-w3g128": {"method": "gptq", "bits": 3},
    "rtn-w4g128": {"method": "rtn", "bits": 4},
    "none": {"method": "none"},
}
COMPOSED = {"suite": "mine", "recipes": RECIPES}


def test_read_space_tells_what_varies_from_what_is_fixed():
    space = read_space(
        ["suite=quick", "recipes.gptq.bits=2,3,4", "seed=1", "recipes.gptq.group_size=32,auto"]
    )
    assert space.fixed == ("suite=quick", "seed=1")
    assert [axis.values for axis in space.axes] == [("2", "3", "4"), ("32", "auto")]
    assert space.size == 6
    choices = list(space.choices())
    first = {"recipes.gptq.bits": "2", "recipes.gptq.group_size": "32"}
    assert choices[0] == first
    assert len(choices) == 6
    assert space.overrides(first)[2:] == ["recipes.gptq.bits=2", "recipes.gptq.group_size=32"]


def test_read_space_takes_hydras_ranges_and_intervals():
    space = read_space(["seed=range(0,3)", "recipes.gptq.damping=tag(log,interval(0.001,1))"])
    assert space.axes[0].values == ("0", "1", "2")
    assert space.axes[1].interval == Interval(0.001, 1, False, True)
    assert space.size is None
    assert read_space(["seed=int(interval(1,9))"]).axes[0].interval == Interval(1, 9, True, False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=1"], "several values"),
        ([], "several values"),
        (["evaluation.smoke_prompts=[a,b]"], "several values"),
        (["seed=1,2", "seed=3,4"], "once"),
        (["suite=glob(*)"], "glob"),
    ],
)
def test_read_space_refuses(overrides, words):
    with pytest.raises(ConfigError, match=words):
        read_space(overrides)


def test_a_path_with_a_comma_in_its_name_is_one_value(tmp_path):
    (tmp_path / "a,b").mkdir()
    space = read_space([f"model.path={tmp_path}/a,b", "seed=1,2"])
    assert space.fixed == (f"model.path={tmp_path}/a,b",)


@pytest.mark.parametrize(
    ("called", "names"),
    [
        ("gptq-w4g128", ["gptq-w4g128"]),
        ("gptq", ["gptq-w4g128", "gptq-w3g128"]),
        ("*", ["gptq-w4g128", "gptq-w3g128", "rtn-w4g128"]),  # none has no bits
        ("*-w4*", ["gptq-w4g128", "rtn-w4g128"]),
    ],
)
def test_matching_goes_by_name_then_method_then_pattern(called, names):
    assert matching(COMPOSED, "recipes", called, "bits") == names


def test_matching_nothing_names_what_there_is():
    with pytest.raises(ConfigError, match=r"gptq-w4g128.*methods gptq, none, rtn"):
        matching(COMPOSED, "recipes", "awq", "bits")


def test_name_entries_calls_recipes_by_their_names():
    named = name_entries(["suite=quick", "recipes.gptq.bits=3", "seed=1"], ROOT)
    assert named == ["suite=quick", "recipes.gptq-w4g128.bits=3", "seed=1"]
