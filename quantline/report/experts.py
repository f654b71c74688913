"""What the page and the summaries say of a mixture's experts: how many tokens each of them saw."""

from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from quantline.calibration.expert_coverage import coverage_figures
from quantline.report.variant import VariantRow


class ModuleOfExperts(NamedTuple):
    """A line of the table of experts.

    Attributes:
        block: Number of the block.
        module: What the experts' names begin with.
        experts: How many.
        fewest: Tokens that came to the expert with the fewest.
        median: Of the experts' tokens.
        most: Tokens that came to the expert with the most.
        starved: How many experts were calibrated on all tokens.
        names: Their numbers, such as "3, 7 to 9".
    """

    block: int
    module: str
    experts: int
    fewest: int
    median: float
    most: int
    starved: int
    names: str


def modules_of_experts(experts: list[dict[str, Any]]) -> list[ModuleOfExperts]:
    """Return the table of experts from what calibration.json has of them."""
    return [
        ModuleOfExperts(
            block=module["block"],
            module=module["module"],
            experts=len(module["tokens"]),
            fewest=min(module["tokens"]),
            median=median(module["tokens"]),
            most=max(module["tokens"]),
            starved=len(module["starved"]),
            names=as_ranges(module["starved"]),
        )
        for module in experts
    ]


def as_ranges(numbers: list[int]) -> str:
    """Return ascending numbers in words, three or more neighbours as a range."""
    if not numbers:
        return ""
    runs = [[numbers[0]]]
    for before, number in pairwise(numbers):
        if number == before + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts: list[str] = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(parts)


def experts_shown(rows: list[VariantRow], experts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what there is on the experts, if a variant that is shown was rounded by it.

    The figures of a variant are shown only if its calibration is the one on disk.
    """
    used = any(row.is_measured and "experts_starved" in row.metrics for row in rows)
    return experts if used else []


def describe_experts(experts: list[dict[str, Any]]) -> str:
    """Return how many experts are starved, in a sentence; "" for a model without experts."""
    figures = coverage_figures(experts)
    if figures is None:
        return ""
    count = figures["experts"]
    starved = figures["experts_starved"]
    if not starved:
        return f"none of {count} experts is starved: enough of the calibration text came to each"
    if starved == 1:
        return (
            f"1 of {count} experts is starved: too little of the calibration text came to it, so "
            "it was calibrated on all of it"
        )
    return (
        f"{starved} of {count} experts are starved: too little of the calibration text came to "
        "them, so they were calibrated on all of it"
    )
