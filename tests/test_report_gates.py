"""Gates: three verdicts, and how much more would settle what cannot be told."""

import math

import pytest

from quantline.config.params import Gate
from quantline.metrics.significance import paired_bootstrap
from quantline.report.gates import check_gate


def gate(metric: str = "mean_kld", operator: str = "<=", threshold: float = 0.1, **more) -> Gate:
    return Gate(metric=metric, operator=operator, threshold=threshold, **more)


def gold(lost: int, won: int, items: int, accuracy: float = 0.9) -> dict:
    return {"gold_accuracy": accuracy, "gold_lost": lost, "gold_won": won, "gold_items": items}


@pytest.mark.parametrize(("value", "operator", "verdict"), [
    (0.05, "<=", "passes"), (0.081, "<=", "cannot tell"), (0.1, "<=", "cannot tell"), (0.119, "<=", "cannot tell"),
    (0.13, "<=", "fails"), (0.05, ">=", "fails"), (0.13, ">", "passes"), (0.09, "<", "cannot tell")])
def test_the_interval_decides(value, operator, verdict):
    found = check_gate(gate(operator=operator), {"mean_kld": value, "mean_kld_se": 0.01, "tokens": 400})
    assert found["verdict"] == verdict
    assert found["interval"] == pytest.approx([value - 0.0196, value + 0.0196], abs=1e-5)


@pytest.mark.parametrize("value", [math.nan, None])
def test_nan_and_what_was_not_measured_fail(value):
    found = check_gate(gate(), {"mean_kld": value, "mean_kld_se": 0.01, "tokens": 9})
    assert (found["passed"], found["verdict"], found["value"]) == (False, "fails", None)
    assert "not measured" in found["said"]


@pytest.mark.parametrize(("setting", "value", "passed"), [
    ("estimate", 0.09, True), ("estimate", 0.11, False), ("passes", 0.11, True), ("fails", 0.09, False)])
def test_what_cannot_be_told_counts_as_the_gate_says(setting, value, passed):
    found = check_gate(gate(cannot_tell=setting), {"mean_kld": value, "mean_kld_se": 0.01, "tokens": 400})
    assert (found["verdict"], found["passed"]) == ("cannot tell", passed)


def test_so_many_more_tokens_bring_the_interval_to_the_threshold():
    figures = {"mean_kld": 0.09, "mean_kld_se": 0.01, "tokens": 400}
    more = check_gate(gate(), figures)["needed"]
    assert more["unit"] == "tokens"
    for tokens, verdict in ((400 + more["more"] - 5, "cannot tell"), (400 + more["more"], "passes")):
        shrunk = figures | {"mean_kld_se": 0.01 * (400 / tokens) ** 0.5, "tokens": tokens}
        assert check_gate(gate(), shrunk)["verdict"] == verdict
    assert check_gate(gate(threshold=0.09), figures)["needed"] == {"more": None, "unit": "tokens"}


def test_a_wider_level_tells_less():
    figures = {"mean_kld": 0.078, "mean_kld_se": 0.01, "tokens": 400}
    assert check_gate(gate(), figures)["verdict"] == "passes"
    assert check_gate(gate(level=0.99), figures)["verdict"] == "cannot tell"


def test_a_size_is_exact():
    found = check_gate(gate("size_bytes", threshold=100), {"size_bytes": 100, "tokens": 9})
    assert (found["verdict"], found["interval"], found["needed"]) == ("passes", None, None)


@pytest.mark.parametrize("asked", [gate("gold_accuracy_delta", ">=", -0.02), gate("gold_accuracy", ">=", -0.02, on="delta")])
def test_the_difference_on_the_gold_set_is_decided_by_its_bootstrap(asked):
    found = check_gate(asked, gold(3, 1, 480))
    assert found["value"] == pytest.approx(-2 / 480)
    assert found["interval"] == list(paired_bootstrap(3, 1, 480))
    assert (found["verdict"], check_gate(asked, gold(0, 0, 9))["verdict"]) == ("passes", "cannot tell")
    assert check_gate(asked, gold(0, 0, 9))["needed"]["unit"] == "items"
    assert check_gate(asked, gold(60, 1, 480))["verdict"] == "fails"


def test_gates_on_a_share_a_task_a_difference_and_a_speed():
    figures = {**gold(0, 0, 50, 1.0), "gold_facts": 0.5, "same_top_p": 1.0, "same_top_p_se": 0.0, "tokens": 50,
               "gold_tasks": {"facts": {"accuracy": 0.5, "items": 30, "lost": 9, "won": 0}},
               "perplexity": 8.0, "perplexity_se": 0.1, "perplexity_delta": 0.2, "perplexity_delta_se": 0.01,
               "decode_tok_s": 90.0, "decode_spread": [70.0, 99.0]}
    found = check_gate(gate("same_top_p", ">=", 0.95), figures)
    assert found["verdict"] == "cannot tell" and found["interval"][0] == pytest.approx(0.9287, abs=1e-3)
    # The half of the interval that reaches towards the threshold counts; the other one is 0 here.
    assert found["needed"]["more"] == math.ceil(50 * ((1 - found["interval"][0]) / 0.05) ** 2) - 50
    assert check_gate(gate("gold_facts", ">=", 0.9), figures)["verdict"] == "fails"
    assert check_gate(gate("gold_facts", ">=", -0.05, on="delta"), figures)["value"] == pytest.approx(-0.3)
    assert check_gate(gate("perplexity", "<=", 0.3, on="delta"), figures)["verdict"] == "passes"
    assert check_gate(gate("decode_tok_s", ">=", 60), figures)["verdict"] == "passes"
    slow = check_gate(gate("decode_tok_s", ">=", 80), figures)
    assert slow["verdict"] == "cannot tell" and slow["needed"]["more"] is None and "repetitions" in slow["said"]


def test_on_without_quotes_is_understood_and_a_difference_needs_a_baseline():
    assert Gate.model_validate({"metric": "perplexity", "operator": "<=", "threshold": 1, True: "delta"}).on == "delta"
    with pytest.raises(ValueError, match="goes with perplexity and gold_"):
        gate("mean_kld", on="delta")
