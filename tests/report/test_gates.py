"""Gates: three verdicts, and how much more would decide what cannot be told."""

import json
import math

import pytest

from quantline.config.targets import Gate
from quantline.metrics.significance import paired_bootstrap
from quantline.report.gates import check_gate

FIGURES = {"mean_kld": 0.09, "mean_kld_se": 0.01, "tokens": 400}


def make_gate(
    metric: str = "mean_kld", operator: str = "<=", threshold: float = 0.1, **options
) -> Gate:
    return Gate(metric=metric, operator=operator, threshold=threshold, **options)


def gold_figures(lost: int, won: int, items: int, accuracy: float = 0.9) -> dict:
    return {
        "gold_accuracy": accuracy,
        "gold_lost": lost,
        "gold_won": won,
        "gold_items": items,
    }


@pytest.mark.parametrize(
    ("value", "operator", "verdict"),
    [
        (0.05, "<=", "passes"),
        (0.081, "<=", "cannot tell"),
        (0.1, "<=", "cannot tell"),
        (0.119, "<=", "cannot tell"),
        (0.13, "<=", "fails"),
        (0.05, ">=", "fails"),
        (0.13, ">", "passes"),
        (0.09, "<", "cannot tell"),
    ],
)
def test_check_gate_is_decided_by_the_interval(value, operator, verdict):
    checked = check_gate(make_gate(operator=operator), FIGURES | {"mean_kld": value})
    assert checked["verdict"] == verdict
    assert checked["interval"] == pytest.approx([value - 0.0196, value + 0.0196], abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, None])
def test_check_gate_fails_nan_and_what_was_not_measured(value):
    checked = check_gate(make_gate(), FIGURES | {"mean_kld": value})
    assert checked["passed"] is False
    assert checked["verdict"] == "fails"
    assert checked["value"] is None
    assert "not measured" in checked["said"]


@pytest.mark.parametrize(
    ("setting", "value", "passed"),
    [
        ("estimate", 0.09, True),
        ("estimate", 0.11, False),
        ("passes", 0.11, True),
        ("fails", 0.09, False),
    ],
)
def test_check_gate_counts_what_it_cannot_tell_as_the_gate_says(setting, value, passed):
    checked = check_gate(make_gate(cannot_tell=setting), FIGURES | {"mean_kld": value})
    assert checked["verdict"] == "cannot tell"
    assert checked["passed"] == passed


def test_check_gate_needs_as_many_tokens_as_bring_the_interval_to_the_threshold():
    needed = check_gate(make_gate(), FIGURES)["needed"]
    assert needed["unit"] == "tokens"
    enough = 400 + needed["more"]
    for tokens, verdict in ((enough - 5, "cannot tell"), (enough, "passes")):
        shrunk = {"mean_kld_se": 0.01 * (400 / tokens) ** 0.5, "tokens": tokens}
        assert check_gate(make_gate(), FIGURES | shrunk)["verdict"] == verdict
    at_the_threshold = check_gate(make_gate(threshold=0.09), FIGURES)
    assert at_the_threshold["needed"] == {"more": None, "unit": "tokens"}
    assert at_the_threshold["said"].endswith("it cannot tell; the figure is the threshold itself")


def test_check_gate_at_a_wider_level_tells_less():
    figures = FIGURES | {"mean_kld": 0.078}
    assert check_gate(make_gate(), figures)["verdict"] == "passes"
    assert check_gate(make_gate(level=0.99), figures)["verdict"] == "cannot tell"


def test_check_gate_takes_a_size_as_exact():
    checked = check_gate(make_gate("size_bytes", threshold=100), {"size_bytes": 100, "tokens": 9})
    assert checked["verdict"] == "passes"
    assert checked["interval"] is None
    assert checked["needed"] is None


@pytest.mark.parametrize(
    "gate",
    [
        make_gate("gold_accuracy_delta", ">=", -0.02),
        make_gate("gold_accuracy", ">=", -0.02, on="delta"),
    ],
)
def test_check_gate_decides_a_gold_difference_by_its_bootstrap(gate):
    checked = check_gate(gate, gold_figures(3, 1, 480))
    assert checked["value"] == pytest.approx(-2 / 480)
    assert checked["interval"] == list(paired_bootstrap(3, 1, 480))
    assert checked["verdict"] == "passes"
    few = check_gate(gate, gold_figures(0, 0, 9))
    assert few["verdict"] == "cannot tell"
    assert few["needed"]["unit"] == "items"
    assert check_gate(gate, gold_figures(60, 1, 480))["verdict"] == "fails"


def test_check_gate_on_a_share_has_wilsons_interval():
    figures = {"same_top_p": 1.0, "same_top_p_se": 0.0, "tokens": 50}
    checked = check_gate(make_gate("same_top_p", ">=", 0.95), figures)
    assert checked["verdict"] == "cannot tell"
    low = checked["interval"][0]
    assert low == pytest.approx(0.9287, abs=1e-3)
    # The half of the interval that reaches towards the threshold counts; the other is 0 here.
    assert checked["needed"]["more"] == math.ceil(50 * ((1 - low) / 0.05) ** 2) - 50


def test_check_gate_on_a_task_of_the_gold_set():
    figures = {
        **gold_figures(0, 0, 50, 1.0),
        "gold_facts": 0.5,
        "gold_tasks": {"facts": {"accuracy": 0.5, "items": 30, "lost": 9, "won": 0}},
        "tokens": 50,
    }
    assert check_gate(make_gate("gold_facts", ">=", 0.9), figures)["verdict"] == "fails"
    difference = check_gate(make_gate("gold_facts", ">=", -0.05, on="delta"), figures)
    assert difference["value"] == pytest.approx(-0.3)


def test_check_gate_on_a_difference_of_perplexity():
    figures = {
        "perplexity": 8.0,
        "perplexity_se": 0.1,
        "perplexity_delta": 0.2,
        "perplexity_delta_se": 0.01,
        "tokens": 50,
    }
    assert check_gate(make_gate("perplexity", "<=", 0.3, on="delta"), figures)["passed"]
    assert check_gate(make_gate("perplexity", "<=", 0.3), figures)["verdict"] == "fails"


def test_check_gate_on_a_speed_goes_by_the_spread_of_its_repetitions():
    figures = {"decode_tok_s": 90.0, "decode_spread": [70.0, 99.0]}
    assert check_gate(make_gate("decode_tok_s", ">=", 60), figures)["verdict"] == "passes"
    slow = check_gate(make_gate("decode_tok_s", ">=", 80), figures)
    assert slow["verdict"] == "cannot tell"
    assert slow["needed"]["more"] is None
    assert "over the repetitions" in slow["said"]
    assert "no number of repetitions is known that would" in slow["said"]


def test_gate_reads_on_without_quotes():
    values = {"metric": "perplexity", "operator": "<=", "threshold": 1, True: "delta"}
    assert Gate.model_validate(values).on == "delta"


BUSY = {"busy": ["other processes used 1.0 of 2 cores"]}


@pytest.mark.parametrize(
    ("metric", "operator", "threshold", "verdict", "passed"),
    [
        ("decode_tok_s", ">=", 60, "passes", True),  # alone on the machine it is faster still
        ("decode_tok_s", ">=", 100, "cannot tell", False),
        ("decode_tok_s", "<=", 100, "cannot tell", True),
        ("load_s", "<=", 2, "passes", True),
        ("load_s", "<=", 0.5, "cannot tell", False),
        ("size_bytes", "<=", 3, "fails", False),  # does not depend on it
    ],
)
def test_check_gate_on_a_busy_machine_tells_what_more_quiet_could_not_change(
    metric, operator, threshold, verdict, passed
):
    figures = BUSY | {
        "decode_tok_s": 90.0,
        "decode_spread": [70.0, 99.0],
        "load_s": 1.0,
        "size_bytes": 5,
    }
    checked = check_gate(make_gate(metric, operator, threshold), figures)
    assert (checked["verdict"], checked["passed"]) == (verdict, passed)
    json.dumps(checked, allow_nan=False)
    if verdict == "cannot tell":
        assert "on a busy machine (other processes used 1.0 of 2 cores)" in checked["said"]
        assert "measure again while nothing else runs" in checked["said"]
        for setting, counts in (("passes", True), ("fails", False)):
            gate = make_gate(metric, operator, threshold, cannot_tell=setting)
            assert check_gate(gate, figures)["passed"] is counts
