"""A search with Optuna: which experiment next, from what those before it gave.

The study is a file of the sweep's folder, so that a search that was interrupted goes on where it
stopped. Its sampler is the Tree-structured Parzen Estimator (Bergstra et al., NeurIPS 2011), which
takes limits into account.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantline.errors import ConfigError
from quantline.files import sha256_json
from quantline.messages import say
from quantline.metrics.figure import figure_of
from quantline.sweeps.experiments import SWEEPS
from quantline.sweeps.goal import INSTALL, Goal
from quantline.sweeps.plan import Plan, Point, make_point
from quantline.sweeps.results import Result
from quantline.sweeps.space import Choice, Interval, Space

REPEATS = 30  # of what was tried already, after which a search is given something new
CHOICE = "choice"  # of a trial's attributes


def import_optuna() -> Any:
    """Return Optuna. Raises ConfigError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            f"expected Optuna for --optuna, found none; install it: {INSTALL}"
        ) from None
    return optuna


def first_choices(space: Space) -> list[Choice]:
    """Return the corners of a space, by which the sweep is checked before a search begins."""
    low = {}
    high = {}
    for axis in space.axes:
        if axis.interval is not None:
            low[axis.key] = as_text(axis.interval, axis.interval.low)
            high[axis.key] = as_text(axis.interval, axis.interval.high)
        else:
            low[axis.key] = axis.values[0]
            high[axis.key] = axis.values[-1]
    return [low, high] if low != high else [low]


def as_text(interval: Interval, value: float) -> str:
    """Return a number of an interval as an override has it."""
    return str(int(value)) if interval.is_integer else f"{value:.6g}"


class Search:
    """Asks a study for experiments, and tells it what they gave."""

    def __init__(self, goal: Goal, plan: Plan, name: str, root: Path) -> None:
        """Open the study, or begin one.

        Raises:
            ConfigError: If Optuna is not installed.
        """
        optuna = import_optuna()
        self._optuna = optuna
        self._goal = goal
        self._plan = plan
        self._root = root
        self._running: dict[str, Any] = {}  # label → trial
        self._best: tuple[tuple[float, ...], Result] | None = None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._distributions = {axis.key: self._distribution(axis) for axis in plan.space.axes}
        # Another goal, or other values, is another study.
        base = plan.base.model_dump(mode="json")
        asked = [base, list(goal.objectives), list(goal.limits), repr(plan.space)]
        identity = sha256_json(asked)[:12]
        folder = root / SWEEPS / name
        folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.journal"))
        directions = ["minimize" if each.lower else "maximize" for each in goal.objectives]
        self._study = optuna.create_study(
            study_name=identity,
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=plan.base.seed),
            directions=directions,
            load_if_exists=True,
        )
        self._resume()

    def _distribution(self, axis: Any) -> Any:
        distributions = self._optuna.distributions
        if axis.interval is None:
            return distributions.CategoricalDistribution(axis.values)
        low, high, is_integer, logarithmic = axis.interval
        if is_integer:
            return distributions.IntDistribution(int(low), int(high), log=logarithmic)
        return distributions.FloatDistribution(low, high, log=logarithmic)

    def _resume(self) -> None:
        """Ask again for what an interrupted search left without an answer."""
        state = self._optuna.trial.TrialState
        left = self._study.get_trials(deepcopy=False, states=(state.RUNNING,))
        for trial in left:
            self._study.tell(trial.number, state=state.FAIL)
            self._study.enqueue_trial(trial.params)
        before = self._answered()
        if before:
            say(f"the search goes on after {len(before)} of {self._goal.trials} experiments")

    def _answered(self) -> dict[str, Any]:
        """Return the trials that an experiment has answered, by what they tried."""
        state = self._optuna.trial.TrialState
        trials: dict[str, Any] = {}
        for trial in self._study.get_trials(deepcopy=False):
            done = trial.state == state.COMPLETE or "failed" in trial.user_attrs
            if done and CHOICE in trial.user_attrs:
                trials.setdefault(trial.user_attrs[CHOICE], trial)
        return trials

    def ask(self) -> Point | None:
        """Return the next experiment; None if the search is over, or waits for one that runs."""
        state = self._optuna.trial.TrialState
        answered = self._answered()
        size = self._plan.space.size
        for number in itertools.count():
            tried = len(answered) + len(self._running)
            if tried >= self._goal.trials or (size is not None and tried >= size):
                return None
            if number == REPEATS and not self._enqueue_untried(answered):
                return None
            trial = self._study.ask(self._distributions)
            choice = self._choice(trial.params)
            text = json.dumps(choice, sort_keys=True)
            if text in answered:
                self._repeat(trial, answered[text])
                continue
            try:
                point = make_point(self._plan.space, choice, self._root)
            except ConfigError as error:
                say(f"left out: {error}", error=True)
                self._fail(trial, text)
                answered[text] = trial
                continue
            if point.label in self._running:
                self._study.tell(trial, state=state.FAIL)
                continue
            trial.set_user_attr(CHOICE, text)
            self._running[point.label] = trial
            return point
        raise AssertionError("counting ends never")

    def _enqueue_untried(self, answered: Mapping[str, Any]) -> bool:
        """Let the study ask for what was not tried yet; whether there is something."""
        running = {trial.user_attrs[CHOICE] for trial in self._running.values()}
        for choice in self._plan.space.choices():
            if json.dumps(choice, sort_keys=True) not in {*answered, *running}:
                self._study.enqueue_trial(dict(choice))
                return True
        return False

    def _choice(self, values: dict[str, Any]) -> Choice:
        choice = {}
        for axis in self._plan.space.axes:
            value = values[axis.key]
            choice[axis.key] = value if axis.interval is None else as_text(axis.interval, value)
        return choice

    def _repeat(self, trial: Any, before: Any) -> None:
        """Answer a trial by what the same one gave before."""
        state = self._optuna.trial.TrialState
        if before.state != state.COMPLETE:
            self._study.tell(trial, state=state.FAIL)
            return
        for limit in self._goal.limits:
            trial.set_constraint(limit.text, before.user_attrs[limit.text])
        self._study.tell(trial, list(before.values))

    def _fail(self, trial: Any, text: str) -> None:
        trial.set_user_attr(CHOICE, text)
        trial.set_user_attr("failed", True)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def tell(self, point: Point, results: Sequence[Result]) -> None:
        """Tell the study the best result of an experiment."""
        trial = self._running.pop(point.label)
        ranked = []
        for result in results:
            rank = self._goal.rank(result.row.figures)
            if result.row.is_measured and all(math.isfinite(part) for part in rank):
                ranked.append((rank, result))
        if not ranked:
            self._fail(trial, trial.user_attrs[CHOICE])
            return
        rank, best = min(ranked, key=lambda pair: (pair[0], pair[1].row.variant))
        figures = best.row.figures
        for limit, over in zip(self._goal.limits, self._goal.violations(figures), strict=True):
            trial.set_constraint(limit.text, over)
            trial.set_user_attr(limit.text, over)
        self._study.tell(trial, self._goal.values(figures))
        if self._best is None or rank < self._best[0]:
            self._best = (rank, best)

    def summary(self) -> dict[str, Any]:
        """Return what the search looked for and what it found.

        Returns:
            {goal, trials, best} and, under {said}, the same in sentences.
        """
        tried = len(self._answered())
        said = [f"{tried} of {self._goal.trials} experiments; the search {self._goal.text}"]
        best = None
        if self._best is not None:
            rank, result = self._best
            best = result.row.variant
            parts = []
            for objective in self._goal.objectives:
                figure = figure_of(objective.metric)
                value = result.row.figures[objective.metric]
                parts.append(f"{figure.label} {figure.text(value)}")
            kept = "keeps the limits" if rank[0] <= 0 else "does not keep every limit"
            said.append(f"the best of this call is {best}: {', '.join(parts)}; it {kept}")
        size = self._plan.space.size
        if size is not None and tried >= size:
            said.append("there are no other combinations of these values")
        return {"goal": self._goal.text, "trials": tried, "best": best, "said": said}
