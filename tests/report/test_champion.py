"""A variant takes the place of the champion unless it is worse by the target's figure or gates."""

import json
from dataclasses import replace

import pytest

from quantline.config.targets import Gate, Optimize
from quantline.report.champion import FIGURES, figure_tags, why_not_instead
from quantline.report.variant import VariantRow
from quantline.tracking.model_registry import Champion
from quantline.tracking.run_content import Dataset
from tests.helpers.report import LINEAGE, TARGET, make_row

GATE = TARGET.gates[0]
OPTIONAL = Gate(metric="same_top_p", operator=">=", threshold=0.95, required=False)


def texts(sha256: str = "e" * 64, tokens: int = 100) -> list[Dataset]:
    return [Dataset("evaluation", sha256, "evaluation", {}, {"tokens": tokens})]


def tags_of(row: VariantRow, datasets: list[Dataset] | None = None) -> dict[str, str]:
    names = {key: getattr(row, key) for key in ("variant", "recipe", "format", "runtime")}
    return names | figure_tags(row, texts() if datasets is None else datasets)


def objections(row: VariantRow, champion: VariantRow, target=TARGET, **tags: str) -> list[str]:
    before = Champion("3", tags_of(champion) | tags)
    return why_not_instead(row, tags_of(row), before, target)


def from_source(row: VariantRow, sha256: str) -> VariantRow:
    return replace(row, lineage=LINEAGE | {"source": {"files_sha256": sha256}})


def row(size: float, kld: float, target=TARGET, **fields) -> VariantRow:
    return from_source(make_row("new", size, kld, target, **fields), "one")


def champion_row(size: float, kld: float, target=TARGET, **fields) -> VariantRow:
    return from_source(make_row("old", size, kld, target, **fields), "one")


def test_why_not_instead_takes_the_better_and_refuses_the_worse_by_what_the_target_optimizes():
    assert objections(row(4, 0.05), champion_row(5, 0.01)) == []
    (reason,) = objections(row(6, 0.001), champion_row(5, 0.01))
    assert "new is worse than version 3 (old)" in reason
    assert "--force" in reason
    fastest = TARGET.model_copy(update={"optimize": Optimize(metric="mean_kld", direction="max")})
    assert objections(row(4, 0.05), champion_row(4, 0.06), fastest)
    assert objections(row(4, 0.06), champion_row(4, 0.05), fastest) == []


def test_why_not_instead_lets_the_divergence_decide_where_the_figure_is_the_same():
    assert objections(row(5, 0.01), champion_row(5, 0.01)) == []
    assert objections(row(5, 0.009), champion_row(5, 0.01)) == []
    (reason,) = objections(row(5, 0.011), champion_row(5, 0.01))
    assert "the mean KL divergence 0.011" in reason
    # Slightly larger, which `within` takes for the same, and no better.
    assert objections(row(5.01, 0.011), champion_row(5, 0.01))
    assert objections(row(5.01, 0.009), champion_row(5, 0.01)) == []
    # Of another model the divergence is to another reference.
    retrained = from_source(row(5, 0.011), "two")
    assert objections(retrained, champion_row(5, 0.01)) == []
    assert objections(from_source(row(6, 0.011), "two"), champion_row(5, 0.01))


def test_why_not_instead_counts_gates_that_only_the_champion_passes():
    target = TARGET.model_copy(update={"gates": [GATE, OPTIONAL]})
    before = champion_row(5, 0.01, target)
    assert objections(row(4, 0.01, target), before, target) == []
    worse = row(4, 0.01, target)
    worse.gates[1] = worse.gates[1] | {"passed": False, "said": "too few"}
    (reason,) = objections(worse, before, target)
    assert "passes a gate that new does not: too few" in reason


def test_why_not_instead_lets_a_champion_go_that_does_not_meet_the_present_target():
    strict = TARGET.model_copy(update={"gates": [GATE.model_copy(update={"threshold": 0.005})]})
    assert objections(row(6, 0.001, strict), champion_row(5, 0.01)) != []
    assert objections(row(6, 0.001, strict), champion_row(5, 0.01), strict) == []


def test_why_not_instead_keeps_what_a_gate_said_when_the_champion_was_promoted():
    """A gate that does not apply to it has no figure that could be checked anew."""
    target = TARGET.model_copy(
        update={"gates": [Gate(metric="experts_starved", operator="<=", threshold=0)]}
    )
    before = champion_row(5, 0.01, target)
    before.gates[0] = before.gates[0] | {"passed": True, "verdict": "passes"}
    assert objections(row(6, 0.01), before, target)


def test_why_not_instead_compares_only_what_was_measured_on_the_same():
    before = Champion("3", tags_of(champion_row(5, 0.01)))
    better = row(1, 0.0)
    for datasets, words in (
        (texts("f" * 64), "another evaluation text"),
        (texts(tokens=50), "another evaluation text"),
        ([*texts(), Dataset("gold", "a" * 64, "gold", {}, {"items": 3})], "another gold set"),
        ([], "on which text"),
    ):
        (reason,) = why_not_instead(better, tags_of(better, datasets), before, TARGET)
        assert words in reason and "--force" in reason


def test_why_not_instead_compares_speeds_of_one_machine():
    speed = TARGET.model_copy(update={"optimize": Optimize(metric="decode_tok_s", direction="max")})
    before = champion_row(5, 0.01, speed)
    faster = row(5, 0.01, speed)
    faster.speed = faster.speed | {"decode_tok_s": 200.0}
    assert objections(faster, before, speed) == []
    assert objections(before, faster, speed)
    faster.speed["machine"] = {"cpu": "another"}
    (reason,) = objections(faster, before, speed)
    assert "another machine" in reason


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metrics": 3}', "no JSON"])
def test_why_not_instead_refuses_a_version_without_figures(text):
    (reason,) = objections(row(1, 0.0), champion_row(5, 0.01), **{FIGURES: text})
    assert "no figures among its tags" in reason
    tags = tags_of(champion_row(5, 0.01))
    del tags[FIGURES]
    assert why_not_instead(row(1, 0.0), tags_of(row(1, 0.0)), Champion("3", tags), TARGET)


def test_figure_tags_hold_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_veryprivate")
    made = row(1, 0.0)
    made.metrics["note"] = "hf_veryprivate"
    tags = figure_tags(made, texts())
    assert "hf_veryprivate" not in str(tags)
    assert json.loads(tags[FIGURES])["metrics"]["size_bytes"] == 2**20
