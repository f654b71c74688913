"""From figures to a decision: the variant to ship for a target, and why not the others."""

import math
from typing import NamedTuple

from quantline.config.targets import Target
from quantline.files import MIB
from quantline.metrics.figure import Figure, figure_of, is_measured
from quantline.metrics.interval import measurement
from quantline.report.gates import CANNOT_TELL
from quantline.report.variant import VariantRow

LEVEL = 0.95  # of intervals; the spread of repetitions, by which a speed is judged, has none


class Choice(NamedTuple):
    """The decision for a target.

    Attributes:
        pick: The variant to ship; None if no variant meets the target.
        runner_up: The second best; None if there is none.
        reasons: The decision in sentences.
    """

    pick: str | None
    runner_up: str | None
    reasons: list[str]


def own_objections(row: VariantRow, target: Target) -> list[str]:
    """Return why a variant by itself cannot be shipped for a target; nothing if it can."""
    if not row.is_measured:
        return [row.problem]
    objections = []
    if target.formats is not None and row.format not in target.formats:
        objections.append(f"format {row.format} is not among {', '.join(target.formats)}")
    if target.runtimes is not None and row.runtime not in target.runtimes:
        objections.append(f"runtime {row.runtime} is not among {', '.join(target.runtimes)}")
    size = row.metrics["size_bytes"] / MIB
    if target.max_size_mib is not None and not size <= target.max_size_mib:
        objections.append(f"{size:.1f} MiB is over the limit of {target.max_size_mib:g} MiB")
    memory = row.memory["mib"]
    limit = target.max_memory_mib
    if limit is not None and not (memory is not None and memory <= limit):
        amount = "unknown"
        if memory is not None:
            amount = f"{memory:.0f} MiB, over the limit of {limit:g} MiB"
        objections.append(f"memory is {amount} ({row.memory['formula']})")
    for gate in row.gates:
        if gate["required"] and not gate["passed"]:
            objections.append(gate["said"])
    if math.isnan(optimized_value(row, target)):
        objections.append(f"{target.optimize.metric}, by which the target ranks, is not measured")
    return objections


def fill_in_objections(rows: list[VariantRow], target: Target) -> None:
    """Fill in each row's objections, those that come from the other rows too."""
    for row in rows:
        row.objections = own_objections(row, target)
    runtimes_of_recipe: dict[str, set[str]] = {}
    for row in rows:
        if not row.objections:
            runtimes_of_recipe.setdefault(row.recipe, set()).add(row.runtime)
    for row in rows:
        runtimes = runtimes_of_recipe.get(row.recipe, set())
        if not row.objections and len(runtimes) < target.min_runtimes:
            row.objections.append(
                f"the recipe {row.recipe} meets the target in {', '.join(sorted(runtimes))} alone, "
                f"which wants {target.min_runtimes} runtimes"
            )


def optimized_value(row: VariantRow, target: Target) -> float:
    """Return the figure that the target optimizes; NaN if it was not measured."""
    value = row.figures.get(target.optimize.metric)
    return value if is_measured(value) else math.nan


def counts_as_equal(row: VariantRow, best: VariantRow, target: Target) -> bool:
    """Whether the figures that the target ranks by are too close to tell two variants apart."""
    best_value = optimized_value(best, target)
    distance = abs(optimized_value(row, target) - best_value)
    near = distance <= target.optimize.within * abs(best_value)
    return near or bool(why_undecided(row, best, target))


def why_undecided(row: VariantRow, best: VariantRow, target: Target) -> str:
    """Return why a speed does not tell two variants apart; "" if it does, and for other figures.

    What was measured on a busy machine may be any better than it was measured.
    """
    metric = target.optimize.metric
    if row is best or not figure_of(metric).timed:
        return ""
    ends = []
    for one in (row, best):
        measured = measurement(metric, one.figures, LEVEL)
        if measured is None or measured.interval is None:
            return ""
        ends.append(measured.interval)
    (low, high), (best_low, best_high) = ends
    if low > best_high or high < best_low:
        return ""
    busy = [one.variant for one in (row, best) if one.busy]
    if busy:
        return f"the machine was busy while {' and '.join(busy)} was measured"
    return "their repetitions overlap"


def choose(rows: list[VariantRow], target: Target) -> Choice:
    """Choose the variant to ship.

    Among the variants without objections it is the best by `target.optimize`; those within its
    share of the best figure are told apart by KL divergence and then by name.

    Args:
        rows: All variants. Their `objections` are filled in, and their `why_not`: what they lost
            by.
        target: Of the deployment.
    """
    fill_in_objections(rows, target)
    able = [row for row in rows if not row.objections]
    if not able:
        for row in rows:
            row.why_not = row.objections
        return Choice(None, None, [f"no variant meets the target {target.name}; each row says why"])
    sign = 1 if target.optimize.direction == "min" else -1
    best = min(able, key=lambda row: (sign * optimized_value(row, target), row.variant))

    def rank(row: VariantRow) -> tuple[bool, float, float, str]:
        value = optimized_value(row, target)
        behind = not counts_as_equal(row, best, target)
        return behind, sign * value * behind, row.metrics["mean_kld"], row.variant

    able.sort(key=rank)
    pick = able[0]
    for row in rows:
        row.why_not = row.objections
        if not row.objections and row is not pick:
            row.why_not = [_lost_by(row, pick, best, target)]
    runner_up = able[1].variant if len(able) > 1 else None
    return Choice(pick.variant, runner_up, _reasons(able, best, target))


def _reasons(able: list[VariantRow], best: VariantRow, target: Target) -> list[str]:
    """Return the decision in sentences; `able` are the variants that meet the target, best first.

    `best` has the best figure to rank by, which the pick may miss by a little.
    """
    pick = able[0]
    figure = figure_of(target.optimize.metric)
    reasons = [_first_reason(able, figure, best, target)]
    for row in able[1:]:
        why = why_undecided(row, best if best is not row else pick, target)
        if why:
            reasons.append(
                f"{figure.label} cannot tell {row.variant} from it ({why}): the KL divergence "
                "decides between them"
            )
    metrics = pick.metrics
    reasons.append(
        f"its mean KL divergence from full precision is {metrics['mean_kld']:.4g} ± "
        f"{metrics['mean_kld_se']:.2g}"
    )
    if "gold_accuracy" in metrics:
        reasons.append(
            f"it answers {metrics['gold_accuracy']:.1%} of the gold set, "
            f"{metrics['gold_accuracy_delta']:+.1%} from full precision "
            f"({metrics['gold_flips']} of {metrics['gold_items']} answers flip, "
            f"p = {metrics['gold_p_value']:.2g})"
        )
    if target.max_memory_mib is not None or target.context is not None:
        memory = pick.memory
        amount = "unknown" if memory["mib"] is None else f"{memory['mib']:.0f} MiB"
        reasons.append(f"memory: {amount}, {memory['provenance']}: {memory['formula']}")
    if pick.estimated:
        hardware = pick.estimated["hardware"]
        reasons.append(f"decoding on {hardware}, estimated: {pick.estimated['formula']}")
    reasons += [gate["said"] for gate in pick.gates if gate["verdict"] == CANNOT_TELL]
    if len(able) > 1:
        second = able[1]
        value = figure.text(optimized_value(second, target))
        reasons.append(f"runner-up: {second.variant}, {figure.label} {value}")
    return reasons


def _first_reason(able: list[VariantRow], figure: Figure, best: VariantRow, target: Target) -> str:
    """Return what the pick is best in."""
    value = optimized_value(able[0], target)
    if len(able) == 1:
        text = f"no other variant meets the target {target.name}; its {figure.label}"
    else:
        superlative = "smallest" if target.optimize.direction == "min" else "largest"
        near = _nearness(able[0], best, target)
        text = (
            f"of {len(able)} variants that meet the target {target.name}, it has the "
            f"{superlative} {figure.label}{near}"
        )
    return f"{text}: {figure.text(value)}"


def _nearness(row: VariantRow, best: VariantRow, target: Target) -> str:
    """Return how far a variant's figure to rank by is the other's, as words that follow it."""
    value = optimized_value(row, target)
    best_value = optimized_value(best, target)
    if value == best_value:
        return ""
    if abs(value - best_value) <= target.optimize.within * abs(best_value):
        return f" to within {target.optimize.within:.1%}"
    return f" as far as can be told ({why_undecided(row, best, target)})"


def _lost_by(row: VariantRow, pick: VariantRow, best: VariantRow, target: Target) -> str:
    """Return by how much a variant that meets the target is behind the pick.

    `best` has the best figure to rank by.
    """
    figure = figure_of(target.optimize.metric)
    value = optimized_value(row, target)
    picked = optimized_value(pick, target)
    if counts_as_equal(row, best, target):
        near = _nearness(row, pick if pick is not row else best, target)
        return (
            f"meets the target; {figure.label} is the pick's{near}, its mean KL divergence "
            f"{row.metrics['mean_kld']:.4g} to the pick's {pick.metrics['mean_kld']:.4g}"
        )
    comparative = "more" if value > picked else "less"
    share = f" ({abs(value / picked - 1):.0%})" if picked else ""
    return (
        f"meets the target; {figure.label} {figure.text(value)}, "
        f"{figure.text(abs(value - picked))}{share} {comparative} than the pick"
    )
