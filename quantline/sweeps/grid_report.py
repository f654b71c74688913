"""The content of a sweep's page: every experiment beside the others, and the one to ship."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantline.config.model_name import shown_name
from quantline.model.architecture import Architecture
from quantline.report.build import rank
from quantline.report.variant import VariantRow
from quantline.sweeps.plan import Plan
from quantline.sweeps.results import Result, without_twins


@dataclass
class GridReport:
    """A sweep's page, and reports/sweeps/<name>.json, whose keys the fields are.

    Attributes:
        name: Of the sweep.
        model: Id or path of the unquantized model.
        axes: Key → its values; of a search over an interval its ends.
        results: Every variant of every experiment and of the workspace, the best first.
        target: The target, as params.yaml has it.
        pick: The name on the page of the one to ship; None if none meets the target.
        reasons: The decision in sentences.
        command: What makes the sweep again.
        commit: That is checked out.
        search: What a search looked for and what it found; empty for a grid.
    """

    name: str
    model: str
    axes: dict[str, list[str]]
    results: list[Result]
    target: dict[str, Any]
    pick: str | None
    reasons: list[str]
    command: str
    commit: str
    search: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[VariantRow]:
        """The rows of all results."""
        return [result.row for result in self.results]

    @property
    def measured(self) -> list[Result]:
        """The results that have figures."""
        return [result for result in self.results if result.row.is_measured]

    @property
    def failed(self) -> list[Result]:
        """The results of experiments that have none."""
        return [result for result in self.results if not result.row.is_measured]

    @property
    def measured_on(self) -> str:
        """The last day on which something was measured; "" if nothing was."""
        days = (result.row.speed.get("measured_on") or "" for result in self.measured)
        return max(days, default="")

    @property
    def picked(self) -> Result | None:
        """The result to ship."""
        return next((each for each in self.results if each.row.variant == self.pick), None)

    def for_terminal(self) -> dict[str, Any]:
        """Return what the table in the terminal shows of it."""
        rows = [row.to_json() for row in self.rows]
        chosen = {"pick": self.pick, "reasons": self.reasons}
        return {"target": self.target, "variants": rows} | chosen

    def to_json(self) -> dict[str, Any]:
        """Return the report as its JSON file has it."""
        return {
            "name": self.name,
            "model": self.model,
            "axes": self.axes,
            "target": self.target,
            "pick": self.pick,
            "reasons": self.reasons,
            "command": self.command,
            "commit": self.commit,
            "search": self.search,
            "variants": [result.to_json() for result in self.results],
        }


def make_report(
    plan: Plan,
    name: str,
    results: Sequence[Result],
    command: str,
    commit: str,
    arch: Architecture | None,
    search: Mapping[str, Any] | None = None,
) -> GridReport:
    """Rank results, and choose one for the target.

    Args:
        plan: Of the sweep.
        name: Of the sweep.
        results: Of the experiments and of the workspace.
        command: What makes the sweep again.
        commit: That is checked out.
        arch: Of the unquantized model; None leaves the size of its cache unknown.
        search: What a search looked for.
    """
    kept = without_twins(results)
    rows = [result.row for result in kept]
    choice = rank(rows, plan.base.target, arch)
    places = {row.variant: place for place, row in enumerate(rows)}
    kept.sort(key=lambda result: places[result.row.variant])
    axes = {}
    for axis in plan.space.axes:
        ends = axis.interval
        axes[axis.key] = list(axis.values) if ends is None else [f"{ends.low:g}", f"{ends.high:g}"]
    return GridReport(
        name=name,
        model=shown_name(plan.base.model),
        axes=axes,
        results=kept,
        target=plan.base.target.model_dump(mode="json"),
        pick=choice.pick,
        reasons=choice.reasons,
        command=command,
        commit=commit,
        search=dict(search or {}),
    )
