"""Whether a variant may take the place of the version that a target ships now.

A version keeps the figures that it was promoted for among its tags. A variant takes its place
unless it is worse by the target's own figure or gates, as far as both can be compared.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quantline.config.targets import Gate, Target
from quantline.messages import redacted
from quantline.metrics.figure import figure_of
from quantline.report.gates import check_gate
from quantline.report.selection import counts_as_equal, optimized_value, own_objections
from quantline.report.variant import VariantRow
from quantline.tracking.model_registry import Champion
from quantline.tracking.run_content import Dataset

FIGURES = "quantline.figures"  # tags of a version
MEASURED_ON = "quantline.measured_on"
FORCE = "`quantline promote --force` promotes it all the same"
# How sentences call what figures were measured on.
TEXTS = {"evaluation": "evaluation text", "gold": "gold set"}


def figure_tags(row: VariantRow, datasets: Sequence[Dataset]) -> dict[str, str]:
    """Return the tags from which a later variant is compared with this one.

    Args:
        row: Of the variant that is promoted.
        datasets: What its figures were measured on.
    """
    measured_on: dict[str, Any] = {dataset.name: dataset.sha256 for dataset in datasets}
    measured_on |= {dataset.name + " size": dataset.profile for dataset in datasets}
    measured_on["source"] = row.lineage["source"]["files_sha256"]
    figures = {
        "metrics": row.metrics,
        "speed": row.speed,
        "memory": row.memory,
        "estimated": row.estimated,
        "gates": row.gates,
    }
    return {
        FIGURES: json.dumps(redacted(figures), sort_keys=True),
        MEASURED_ON: json.dumps(measured_on, sort_keys=True),
    }


def why_not_instead(
    row: VariantRow, tags: Mapping[str, str], champion: Champion, target: Target
) -> list[str]:
    """Return why a variant is not to take the place of a version; nothing if it may.

    Args:
        row: Of the variant, which meets the target.
        tags: Of the variant, from `figure_tags`.
        champion: The version that has the alias.
        target: Of the deployment, as it is now.
    """
    name = f"version {champion.number}"
    try:
        before = _row_of(champion, target)
        there: dict[str, Any] = json.loads(champion.tags[MEASURED_ON])
    except (KeyError, TypeError, ValueError, AttributeError):
        return [f"{name} has no figures among its tags that this could be compared with; {FORCE}"]
    here: dict[str, Any] = json.loads(tags[MEASURED_ON])
    if "evaluation" not in here:
        return [f"nothing here says on which text this was measured; {FORCE}"]
    for key, text in TEXTS.items():
        keys = (key, f"{key} size")
        if [here.get(one) for one in keys] != [there.get(one) for one in keys]:
            return [f"{name} was measured on another {text}: the two cannot be compared; {FORCE}"]
    if own_objections(before, target):
        return []  # the target wants more by now than that version gives
    metric = target.optimize.metric
    machines = [one.speed.get("machine") for one in (row, before)]
    if figure_of(metric).timed and machines[0] != machines[1]:
        return [f"{metric} of {name} was measured on another machine; {FORCE}"]
    worse = _gates_lost(row, before, name) or _worse_figure(
        row, before, target, name, is_same_source=here.get("source") == there.get("source")
    )
    return [f"{sentence}; {FORCE}" for sentence in worse]


def _row_of(champion: Champion, target: Target) -> VariantRow:
    """Return a version as a row, judged by the present target.

    Raises:
        KeyError, TypeError, ValueError or AttributeError: If its tags do not say enough.
    """
    tags = champion.tags
    figures = json.loads(tags[FIGURES])
    row = VariantRow(tags["variant"], tags["recipe"], tags["format"], tags["runtime"])
    row.metrics = dict(figures["metrics"])
    row.speed = dict(figures["speed"])
    row.memory = dict(figures["memory"])
    row.estimated = dict(figures["estimated"])
    row.gates = [_checked(gate, figures["gates"], row) for gate in target.gates]
    own_objections(row, target)  # looks all figures up that are needed here
    row.metrics["mean_kld"] = float(row.metrics["mean_kld"])
    return row


def _checked(gate: Gate, before: list[dict[str, Any]], row: VariantRow) -> dict[str, Any]:
    """Return what a gate said when a version was promoted; checked anew if it is another gate."""
    wanted = gate.model_dump()
    same = [said for said in before if {key: said[key] for key in wanted} == wanted]
    return same[0] if same else check_gate(gate, row.figures)


def _gates_lost(row: VariantRow, before: VariantRow, name: str) -> list[str]:
    """Return the gates, optional ones too, that a version passes and a variant does not."""
    passed = [
        (gate["metric"], gate["operator"], gate["threshold"])
        for gate in before.gates
        if gate["passed"]
    ]
    lost = []
    for gate in row.gates:
        key = (gate["metric"], gate["operator"], gate["threshold"])
        if not gate["passed"] and key in passed:
            lost.append(f"{name} passes a gate that {row.variant} does not: {gate['said']}")
    return lost


def _worse_figure(
    row: VariantRow, before: VariantRow, target: Target, name: str, is_same_source: bool
) -> list[str]:
    """Return by what a variant is behind a version.

    Where the target's own figure tells them not apart, the KL divergence decides, as it does among
    variants; of another model it is to another reference, and says nothing of which is better.
    """
    metric = target.optimize.metric
    value = optimized_value(row, target)
    champion_value = optimized_value(before, target)
    sign = 1 if target.optimize.direction == "min" else -1
    is_first = sign * value <= sign * champion_value
    best = row if is_first else before
    figure = figure_of(metric)
    if not counts_as_equal(row, best, target):
        return [
            f"{row.variant} is worse than {name} ({before.variant}) by what the target optimizes: "
            f"{figure.label} {figure.text(value)}, of {name} {figure.text(champion_value)}"
        ]
    tells_apart = is_first and not counts_as_equal(before, best, target)
    kld = row.metrics["mean_kld"]
    champion_kld = before.metrics["mean_kld"]
    if tells_apart or not is_same_source or kld <= champion_kld:
        return []
    return [
        f"{row.variant} is worse than {name} ({before.variant}): {figure.label} is the same, and "
        f"the mean KL divergence {kld:.4g}, of {name} {champion_kld:.4g}"
    ]
