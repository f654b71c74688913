"""Whether the figures of a target are ones that there can be."""

import pytest

from quantline.config.compose import load_params
from quantline.config.targets import Gate
from quantline.errors import ConfigError
from quantline.metrics.figure import FIGURES
from quantline.metrics.target_metrics import check_metrics, has_delta


def gated(project, **gate):
    """Return parameters whose target has one gate."""
    project.compose("suite=default")
    params = load_params()
    gates = [Gate.model_validate({"operator": "<=", "threshold": 1.0} | gate)]
    return params.model_copy(update={"target": params.target.model_copy(update={"gates": gates})})


def test_every_registered_difference_can_be_gated_on():
    compared = {key for key in FIGURES if has_delta(key)}
    assert compared == {"perplexity", "gold_accuracy"}
    assert has_delta("gold_chat") and not has_delta("gold_flips")


@pytest.mark.parametrize("metric", ["mean_kld", "gold_flips", "size_bytes"])
def test_a_gate_on_a_difference_that_is_not_measured_is_refused(project, metric):
    check_metrics(gated(project, metric=metric, on="value"))
    with pytest.raises(ConfigError, match=r"gates.0.on: expected value.*delta goes with"):
        check_metrics(gated(project, metric=metric, on="delta"))


def test_a_gate_on_a_difference_that_is_measured_is_taken(project):
    check_metrics(gated(project, metric="perplexity", on="delta"))
    check_metrics(gated(project, metric="gold_accuracy", on="delta"))
