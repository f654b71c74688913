"""What a search looks for: figures to lower or raise, and limits on others."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from quantline.errors import ConfigError
from quantline.metrics.figure import FIGURES, figure_of, is_measured
from quantline.sweeps.space import Space

LIMIT = re.compile(r"\s*([\w.-]+)\s*(<=|>=|<|>|≤|≥)\s*([-+.\deE]+)\s*")
SAME = {"≤": "<=", "≥": ">="}
INSTALL = "pip install 'quantline[optuna]'"


class Limit(NamedTuple):
    """A figure that has to stay on one side of a number."""

    metric: str
    operator: str
    threshold: float

    @property
    def text(self) -> str:
        """The limit as it is typed."""
        return f"{self.metric}{self.operator}{self.threshold:g}"

    def violation(self, figures: Mapping[str, Any]) -> float:
        """Return how far a figure is over the limit, in shares of it; at most 0 if it is kept.

        NaN, or a figure that was not measured, is over every limit.
        """
        value = figures.get(self.metric)
        if not is_measured(value) or math.isnan(value):
            return math.inf
        over = value - self.threshold
        if self.operator in (">=", ">"):
            over = -over
        if over == 0 and self.operator in ("<", ">"):
            return math.ulp(1.0)
        return float(over / (abs(self.threshold) or 1.0))


class Objective(NamedTuple):
    """A figure, and whether it is to be lowered."""

    metric: str
    lower: bool


class Goal(NamedTuple):
    """What a search looks for.

    Attributes:
        trials: How many experiments it may run in all.
        objectives: One or more.
        limits: That a result has to keep.
    """

    trials: int
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...]

    @property
    def text(self) -> str:
        """The goal in words."""
        aims = []
        for objective in self.objectives:
            verb = "lowers" if objective.lower else "raises"
            aims.append(f"{verb} {figure_of(objective.metric).label}")
        limits = ", ".join(limit.text for limit in self.limits)
        return " and ".join(aims) + (f", subject to {limits}" if limits else "")

    def violations(self, figures: Mapping[str, Any]) -> list[float]:
        """Return how far each limit is exceeded (see `Limit.violation`)."""
        return [limit.violation(figures) for limit in self.limits]

    def values(self, figures: Mapping[str, Any]) -> list[float] | None:
        """Return the figures to lower or raise; None if one was not measured."""
        values = []
        for objective in self.objectives:
            value = figures.get(objective.metric)
            if not is_measured(value) or math.isnan(value):
                return None
            values.append(float(value))
        return values

    def rank(self, figures: Mapping[str, Any]) -> tuple[float, ...]:
        """Return what results are sorted by, the best first: first by limits, then by figures."""
        values = self.values(figures)
        if values is None:
            return (math.inf,)
        over = sum(max(0.0, violation) for violation in self.violations(figures))
        signed = [
            value if objective.lower else -value
            for value, objective in zip(values, self.objectives, strict=True)
        ]
        return (over, *signed)


def read_goal(
    trials: int | None,
    minimize: Sequence[str],
    maximize: Sequence[str],
    subject_to: Sequence[str],
    space: Space,
) -> Goal | None:
    """Read what was typed; None without a search.

    Raises:
        ConfigError: For figures that there are not, limits that cannot be read, and what needs a
            search where there is none.
    """
    if trials is None:
        intervals = [axis.key for axis in space.axes if axis.interval]
        if minimize or maximize or subject_to or intervals:
            what = intervals[0] if intervals else "--minimize, --maximize and --subject-to"
            raise ConfigError(f"{what}: expected a search, found none; give --optuna NUMBER")
        return None
    objectives = [Objective(_known(name), True) for name in minimize]
    objectives += [Objective(_known(name), False) for name in maximize]
    limits = tuple(_read_limit(text) for text in subject_to)
    return Goal(trials, tuple(objectives or [Objective("mean_kld", True)]), limits)


def _read_limit(text: str) -> Limit:
    found = LIMIT.fullmatch(text)
    try:
        number = float(found[3]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not math.isfinite(number):
        raise ConfigError(
            f"expected a limit such as 'size_bytes<=2e9', found {text!r}; the figures are "
            f"{_figures()}"
        )
    return Limit(_known(found[1]), SAME.get(found[2], found[2]), number)


def _known(metric: str) -> str:
    """Return the name of a figure. Raises ConfigError for one that there is not."""
    if metric not in FIGURES:
        raise ConfigError(FIGURES.unknown(metric))
    return metric


def _figures() -> str:
    return ", ".join(sorted(FIGURES))
