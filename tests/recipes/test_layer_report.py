"""The check that no layer is worse than plain rounding."""

import pytest

from quantline.errors import Failure, StageError
from quantline.recipes.layer_report import check_gain


def test_check_gain_looks_at_what_the_recipe_minimizes():
    report = {"error": 3.0, "rtn_error": 2.0, "divergence": 1.0, "rtn_divergence": 1.0}
    check_gain("q_proj", report, "rtn")
    changes = {"output_change": 2.0, "rtn_output_change": 1.0}
    with pytest.raises(StageError, match="q_proj has the output_change 2, more than"):
        check_gain("q_proj", report | changes, "rtn")
    del report["divergence"], report["rtn_divergence"]
    with pytest.raises(StageError) as caught:
        check_gain("q_proj", report, "rtn")
    assert caught.value.failure == Failure.WORSE_THAN_ROUND_TO_NEAREST
    assert str(caught.value) == (
        "q_proj has the error 3, more than round-to-nearest's 2; calibrate on more text, or use rtn"
    )


def test_check_gain_names_the_baseline_of_the_recipe():
    report = {"divergence": 2.0, "ggml_divergence": 1.0, "error": 0.0, "ggml_error": 1.0}
    with pytest.raises(StageError, match=r"ggml's own rounding's 1; .* or use kquant"):
        check_gain("q_proj", report, "ggml")


@pytest.mark.parametrize("error", [float("nan"), 1.00001])
def test_check_gain_refuses_nan_and_all_that_is_not_rounding(error):
    check_gain("q_proj", {"error": 1 + 1e-7, "rtn_error": 1.0}, "rtn")
    with pytest.raises(StageError):
        check_gain("q_proj", {"error": error, "rtn_error": 1.0}, "rtn")
