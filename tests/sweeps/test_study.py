"""A search with Optuna. Skipped where it is not installed, but for what says so."""

import sys

import pytest

from quantline.errors import ConfigError
from quantline.sweeps.goal import Goal, read_goal
from quantline.sweeps.plan import Plan, Point, make_plan
from quantline.sweeps.results import Result
from quantline.sweeps.space import Interval, read_space
from quantline.sweeps.study import Search, as_text, first_choices, import_optuna
from tests.helpers.project import ROOT
from tests.helpers.report import failed_row, make_row

OVERRIDES = ["suite=quick", "recipes.gptq.bits=2,3,4,8", "recipes.gptq.group_size=32,64,128"]


def test_without_optuna_it_is_said_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'quantline\[optuna\]'"):
        import_optuna()


def test_first_choices_are_the_corners_of_a_space():
    space = read_space(["recipes.gptq.bits=2,3,4", "seed=int(interval(1,9))"])
    assert first_choices(space) == [
        {"recipes.gptq.bits": "2", "seed": "1"},
        {"recipes.gptq.bits": "4", "seed": "9"},
    ]
    assert as_text(Interval(0.0, 1.0, False, False), 0.123456789) == "0.123457"


@pytest.fixture(scope="module")
def plan() -> Plan:
    pytest.importorskip("optuna")
    space = read_space(OVERRIDES)
    return make_plan(space, first_choices(space), ROOT)


@pytest.fixture(autouse=True)
def composed_at_once(monkeypatch, request) -> None:
    """Composing takes long, and what was composed is of no interest here."""
    if "plan" not in request.fixturenames:
        return
    base = request.getfixturevalue("plan").points[0]

    def point(space, choice, root) -> Point:
        label = "-".join(choice.values())
        return Point(label, choice, (), base.composed, base.params)

    monkeypatch.setattr("quantline.sweeps.study.make_point", point)


def goal_of(trials: int, *limits: str) -> Goal:
    goal = read_goal(trials, ["mean_kld"], [], limits, read_space(OVERRIDES))
    assert goal is not None
    return goal


def measured(point: Point) -> list[Result]:
    """Return figures as rounding gives them: fewer bits are smaller and farther off."""
    bits, group = (int(value) for value in point.choice.values())
    row = make_row(point.label, bits + 16 / group, 2.0**-bits + group / 1e4)
    return [Result(row, "gptq-w4g128", "gptq", point.choice, experiment=point.label)]


def run(search: Search, most: int = 100) -> list[str]:
    """Run a search to its end, or so many experiments of it, and return them."""
    tried: list[str] = []
    while len(tried) < most:
        point = search.ask()
        if point is None:
            break
        tried.append(point.label)
        search.tell(point, measured(point))
    return tried


def test_search_finds_the_best_within_its_limits_and_tries_nothing_twice(plan, tmp_path):
    search = Search(goal_of(100, "size_bytes<=4.7e6"), plan, "s", tmp_path)
    tried = run(search)
    assert len(tried) == len(set(tried)) == 12  # all that there are, though it might try more
    found = search.summary()
    assert found["best"] == "4-64"  # 4 bits in groups of 32 are too large
    assert any("keeps the limits" in sentence for sentence in found["said"])
    assert any("no other combinations" in sentence for sentence in found["said"])


def test_search_stops_at_its_budget_and_goes_on_where_it_stopped(plan, tmp_path):
    first = run(Search(goal_of(5), plan, "s", tmp_path), most=3)
    left = Search(goal_of(5), plan, "s", tmp_path)
    unanswered = left.ask()  # and then the process is killed
    assert unanswered is not None
    rest = run(Search(goal_of(5), plan, "s", tmp_path))
    assert len(first) == 3 and len(rest) == 2
    assert unanswered.label in rest
    assert not set(first) & set(rest)
    assert run(Search(goal_of(5), plan, "s", tmp_path)) == []


def test_search_with_another_goal_begins_anew(plan, tmp_path):
    run(Search(goal_of(2), plan, "s", tmp_path))
    assert len(run(Search(goal_of(2, "mean_kld<=0.1"), plan, "s", tmp_path))) == 2


def test_search_is_the_same_each_time(plan, tmp_path):
    runs = [run(Search(goal_of(6), plan, name, tmp_path)) for name in ("a", "b")]
    assert runs[0] == runs[1]


def test_search_goes_on_after_an_experiment_without_figures(plan, tmp_path):
    search = Search(goal_of(4), plan, "s", tmp_path)
    point = search.ask()
    assert point is not None
    failed = Result(failed_row("no"), "gptq-w4g128", "gptq", point.choice)
    search.tell(point, [failed])
    assert len(run(search)) == 3
    assert search.summary()["trials"] == 4


def test_search_asks_for_several_at_a_time(plan, tmp_path):
    search = Search(goal_of(3), plan, "s", tmp_path)
    points = [search.ask() for _ in range(4)]
    assert points[3] is None
    labels = {point.label for point in points if point is not None}
    assert len(labels) == 3
