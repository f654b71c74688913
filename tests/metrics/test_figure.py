"""The registry of figures: what it comes with, and what one registration brings about."""

import json
import subprocess
import sys

import numpy as np
import pytest

from quantline.config.targets import Gate, Optimize
from quantline.errors import ConfigError
from quantline.metrics.divergence import compute_figures
from quantline.metrics.figure import (
    FIGURES,
    Column,
    Estimate,
    Figure,
    cli_columns,
    columns_of,
    figure_of,
    register_figure,
    register_metric,
)
from quantline.metrics.significance import wilson
from quantline.metrics.token_values import TokenValues, mean_se
from quantline.report.gates import check_gate
from quantline.report.markdown import render_markdown
from quantline.report.page import render_page
from quantline.report.selection import choose
from tests.helpers.figures import own_figures
from tests.helpers.report import TARGET, make_report, make_row

KEY = "far_share"


@pytest.fixture
def own():
    """A registry that forgets what the test registers."""
    with own_figures():
        yield


def token_values() -> TokenValues:
    draw = np.random.default_rng(0)
    return TokenValues(
        kld=np.sort(draw.exponential(size=50)),
        nll=draw.exponential(size=50),
        reference_nll=draw.exponential(size=50),
        delta_p=draw.normal(size=50),
        same_top=draw.random(50) < 0.9,
    )


def register_far_share(**columns: Column) -> None:
    """Register the share of tokens whose divergence is above one nat, as a plugin would."""

    @register_metric(
        Figure(
            KEY,
            label="share of tokens far off",
            better="lower",
            interval="standard error",
            scale=100,
            format=".1f",
            unit="%",
            columns=columns,
        )
    )
    def far_share(tokens: TokenValues) -> Estimate:
        far = (tokens.kld > 1).astype(np.float64)
        return Estimate(float(far.mean()), mean_se(far))


def test_registered_metric_is_in_the_summary_with_its_error(own):
    tokens = token_values()
    before = compute_figures(tokens)
    register_far_share()
    figures = compute_figures(tokens)
    far = tokens.kld > 1
    assert figures[KEY] == far.mean() and 0 < figures[KEY] < 1
    assert figures[f"{KEY}_se"] == pytest.approx(far.std(ddof=1) / np.sqrt(50))
    assert {key: figures[key] for key in before} == before
    assert set(figures) - set(before) == {KEY, f"{KEY}_se"}


@pytest.mark.parametrize("section", ["tail", "other", "quality"])
def test_registered_metric_has_a_column_on_the_page(own, section, monkeypatch):
    monkeypatch.setattr("quantline.report.page._plots", lambda report: [])  # they take seconds
    metrics = {KEY: 0.04, f"{KEY}_se": 0.01}
    row = make_row("a", 2, 0.01)
    row.metrics |= metrics
    assert "far off, %" not in render_page(make_report([row]))
    assert "Other figures" not in render_page(make_report([row]))
    register_far_share(**{section: Column("far off, %", ".1f", scale=100, detail="error")})
    text = render_page(make_report([row, make_row("old", 3, 0.01)]))
    assert text.count("far off, %") == 1
    assert "4.0<small>± 1</small>" in text
    assert ("Other figures" in text) == (section == "other")


def test_registered_metric_has_a_column_in_markdown_and_in_the_terminal(own):
    register_far_share(
        markdown=Column("far", ".1%", order=22), cli=Column("far %", ".0f", scale=100, order=25)
    )
    row = make_row("a", 2, 0.01)
    row.metrics[KEY] = 0.04
    lines = render_markdown(make_report([row])).splitlines()
    assert "| variant | MiB | bits/weight | far | bits/weight in layers |" in "\n".join(lines)
    shown = "| a | 2.0 | 4.50 | 4.0% | 4.25 | 0.01000 ± 0.00100 |"
    assert any(line.startswith(shown) for line in lines)
    columns = cli_columns()
    assert [column.heading for column in columns][:4] == ["MiB", "bits/w", "far %", "ppl"]
    assert (columns[2].text(0.04), columns[2].text(None)) == ("4", "-")


def test_registered_metric_can_be_gated_on_with_its_interval(own):
    figures = {KEY: 0.04, f"{KEY}_se": 0.01, "tokens": 50}
    gate = Gate(metric=KEY, operator="<=", threshold=0.05)
    register_far_share()
    checked = check_gate(gate, figures)
    assert checked["verdict"] == "cannot tell"
    assert checked["interval"] == pytest.approx([0.04 - 0.0196, 0.04 + 0.0196], abs=1e-5)
    assert check_gate(gate, {})["verdict"] == "fails"
    assert "far_share is not measured" in check_gate(gate, {})["said"]


def test_registered_interval_decides_and_not_the_error_beside_it(own):
    register_figure(Figure(KEY, label="far", interval="share"))
    gate = Gate(metric=KEY, operator="<=", threshold=0.05)
    figures = {KEY: 0.04, f"{KEY}_se": 0.01, "tokens": 50}
    assert check_gate(gate, figures)["interval"] == list(wilson(2, 50))
    FIGURES._entries.pop(KEY)
    register_figure(Figure(KEY, label="far"))
    assert check_gate(gate, figures)["interval"] is None


def test_registered_metric_is_ranked_by_under_its_label(own):
    register_far_share()
    target = TARGET.model_copy(update={"optimize": Optimize(metric=KEY, direction="min")})
    rows = [make_row("far", 1, 0.01), make_row("near", 2, 0.01)]
    for row, share in zip(rows, (0.2, 0.04), strict=True):
        row.metrics[KEY] = share
    choice = choose(rows, target)
    assert (choice.pick, choice.runner_up) == ("near", "far")
    assert "it has the smallest share of tokens far off: 4.0 %" in choice.reasons[0]
    assert choice.reasons[-1] == "runner-up: far, share of tokens far off 20.0 %"
    assert rows[0].why_not == [
        "meets the target; share of tokens far off 20.0 %, 16.0 % (400%) more than the pick"
    ]


def test_figure_that_nobody_registered_keeps_its_key():
    assert KEY not in FIGURES
    assert figure_of(KEY).label == KEY
    target = TARGET.model_copy(update={"optimize": Optimize(metric=KEY, direction="min")})
    row = make_row("a", 1, 0.01)
    assert choose([row], target).pick is None
    assert row.objections == [f"{KEY}, by which the target ranks, is not measured"]


def test_register_figure_refuses_a_key_twice(own):
    with pytest.raises(ConfigError, match="one metric called mean_kld, found two"):
        register_figure(Figure("mean_kld", label="again"))


def test_columns_of_stand_in_their_order():
    assert [column.key for column in columns_of("cli")] == [
        "size_bytes",
        "bits_per_weight",
        "perplexity",
        "mean_kld",
        "same_top_p",
        "gold_accuracy",
        "decode_tok_s",
        "peak_rss_mib",
    ]
    assert [column.heading for column in columns_of("quality")] == [
        "MiB",
        "bits/w",
        "bits/w in layers",
        "KL divergence",
        "perplexity",
        "same top, %",
        "gold, %",
        "flips",
        "p",
    ]
    assert [column.key for column in columns_of("model registry")] == [
        "mean_kld",
        "gold_accuracy",
        "size_bytes",
    ]
    assert columns_of("other") == []


def test_figures_are_described():
    assert len(FIGURES) >= 20
    for key, figure in FIGURES.items():
        assert figure.key == key
        assert figure.label
        assert figure.better or key == "gold_p_value"
        assert (figure.interval == "spread") == (figure.repetitions is not None)


def test_figure_text_has_scale_and_unit():
    assert figure_of("size_bytes").text(3 * 2**20) == "3.0 MiB"
    assert figure_of("memory_mib").text(300.0) == "300.0 MiB"
    assert figure_of("mean_kld").text(0.0123456) == "0.01235"


def test_importing_figure_is_light():
    code = (
        "import json, sys, quantline.metrics.figure\n"
        "light = sorted(sys.modules)\n"
        "list(quantline.metrics.figure.FIGURES)\n"
        "print(json.dumps([light, sorted(sys.modules)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, loaded = json.loads(done.stdout)
    assert "quantline.metrics.figure" in imported
    assert not {"numpy", "scipy", "pydantic", "torch"} & set(imported)
    assert not {"scipy", "torch", "transformers", "numba", "mlflow"} & set(loaded)
