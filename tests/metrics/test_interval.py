"""Figures with their intervals, for what the tests of gates do not reach."""

import pytest

from quantline.metrics.interval import Measurement, measurement


def test_measurement_of_what_nobody_registered_takes_the_error_beside_it():
    figures = {"of_a_plugin": 2.0, "of_a_plugin_se": 0.1, "tokens": 7}
    found = measurement("of_a_plugin", figures, 0.95)
    assert found is not None and found.interval == pytest.approx((1.804, 2.196), abs=1e-3)
    assert (found.count, found.unit) == (7, "tokens")
    assert measurement("of_a_plugin", {"of_a_plugin": 2.0}, 0.95) == Measurement(2.0)


@pytest.mark.parametrize("value", [None, "text", float("nan")])
def test_measurement_of_no_number_is_none(value):
    assert measurement("size_bytes", {"size_bytes": value}, 0.95) is None
    assert measurement("size_bytes", {}, 0.95) is None


def test_measurement_of_a_task_without_a_gold_set_is_none():
    assert measurement("gold_facts", {"tokens": 7}, 0.95) is None
    assert measurement("gold_accuracy", {"tokens": 7}, 0.95, difference=True) is None


def test_measurement_of_a_speed_without_a_spread_is_exact():
    assert measurement("decode_tok_s", {"decode_tok_s": 90.0}, 0.95) == Measurement(90.0)
