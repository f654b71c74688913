"""`quantline sweep`: experiments over values of parameters, side by side, and one page."""

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantline.cli.compose import compose_project
from quantline.cli.dvc import run_dvc
from quantline.cli.program import app, ends_in_one_line, stop
from quantline.config.compose import project_root
from quantline.errors import ConfigError
from quantline.messages import say
from quantline.run.project_lock import project_lock

if TYPE_CHECKING:
    from quantline.sweeps.goal import Goal
    from quantline.sweeps.plan import Plan
    from quantline.sweeps.space import Space

SHARED = ("answer", "reference")  # with all that they need: what every experiment has in common
UNCALIBRATED = ("answer",)


@app.command()
def sweep(
    overrides: Annotated[
        list[str],
        typer.Argument(
            help="Overrides, at least one of them with several values: recipes.gptq.bits=2,3,4",
            show_default=False,
        ),
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Experiments at a time")] = 1,
    name: Annotated[
        str | None,
        typer.Option(help="Of the sweep and its page; else what it varies", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Say which experiments, and run none")] = False,
    optuna: Annotated[
        int | None,
        typer.Option(min=1, help="Search with so many experiments in place of the whole grid"),
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(help="A figure that a search lowers")
    ] = None,
    maximize: Annotated[
        list[str] | None, typer.Option(help="A figure that a search raises")
    ] = None,
    subject_to: Annotated[
        list[str] | None, typer.Option(help="A limit of a search, such as 'size_bytes<=2e9'")
    ] = None,
) -> None:
    """Run an experiment for each combination of values, and make one page over all of them.

    In the place of a recipe's name may stand its method, or a pattern: recipes.*.bits=3,4. What has
    run does not run again, so that an interrupted sweep goes on with the same command.
    """
    from quantline.sweeps.experiments import keep_space, sweep_called
    from quantline.sweeps.goal import read_goal
    from quantline.sweeps.plan import sweep_name
    from quantline.sweeps.space import name_entries, read_space

    command = _command(overrides, jobs, name, optuna, minimize, maximize, subject_to)
    try:
        root = project_root()
        os.chdir(root)
        space = read_space(overrides)
        goal = read_goal(optuna, minimize or [], maximize or [], subject_to or [], space)
        called = name or sweep_called(sweep_name(space), space, goal is not None, root)
        if not re.fullmatch(r"[\w-]+", called, re.ASCII):
            raise ConfigError(f"expected a name of letters, digits, - and _, found {called!r}")
        with ends_in_one_line(), project_lock("quantline sweep"):
            plan = _plan(space, goal, root)
            if dry_run:
                return
            keep_space(called, space, goal is not None, root)
            # As every experiment has it; and so the others of the suite stand on the page too.
            compose_project(name_entries(space.fixed, root), keeps_project=True)
            _run_shared(plan)
            _run(plan, called, root, jobs, goal, command)
    except ConfigError as error:
        raise stop(error) from None


def _plan(space: "Space", goal: "Goal | None", root: Path) -> "Plan":
    """Check the whole sweep, and say what it is."""
    from quantline.sweeps.experiments import check_git
    from quantline.sweeps.plan import make_plan
    from quantline.sweeps.study import first_choices, import_optuna

    check_git(root)
    if goal is not None:
        import_optuna()
    choices = list(space.choices()) if goal is None else first_choices(space)
    plan = make_plan(space, choices, root)
    measures = f"each measures {', '.join(plan.variants)}"
    counts = {len(set(plan.variants) & set(point.composed["variants"])) for point in plan.points}
    if counts != {len(plan.variants)}:
        measures = f"each measures what its suite has of {len(plan.variants)} variants"
    if goal is None:
        say(f"{len(plan.points)} experiments, {measures}:")
        for point in plan.points:
            say(f"  {point.label}")
    else:
        say(f"a search of {goal.trials} experiments, {measures}")
    return plan


def _run_shared(plan: "Plan") -> None:
    """Run once what all experiments have in common, so that they find it in DVC's cache.

    Raises:
        typer.Exit: With 1, if it fails: every experiment would.
    """
    stages = SHARED if plan.shares_calibration else UNCALIBRATED
    failed, _ = run_dvc("repro", *stages)
    if failed:
        say("what all experiments share has failed, so none was started", error=True)
        raise typer.Exit(1)


def _run(plan: "Plan", name: str, root: Path, jobs: int, goal: "Goal | None", command: str) -> None:
    """Run the experiments, and show what came of them.

    Raises:
        typer.Exit: With 1, if one failed; the page has all others.
    """
    from quantline.report.terminal import print_report
    from quantline.sweeps.study import Search
    from quantline.sweeps.sweep import Sweep

    running = Sweep(plan, name, root, jobs)
    if goal is None:
        running.run_grid()
        done = running.finish(command)
    else:
        search = Search(goal, plan, name, root)
        running.run_search(search)
        done = running.finish(command, search.summary())
    print_report(done.report.for_terminal())
    for sentence in done.report.search.get("said", []):
        say(f"The search: {sentence}")
    say(f"Page: {done.page}")
    if done.untracked is not None:
        say(
            f"MLflow does not have all of the sweep: {done.untracked}; it is kept, `quantline "
            "track` delivers it",
            error=True,
        )
    for result in done.failed:
        say(f"{result.row.variant}: {result.row.failure}: {result.row.message}", error=True)
    if done.failed:
        say("something failed: the same command runs only that again", error=True)
        raise typer.Exit(1)


def _command(
    overrides: list[str],
    jobs: int,
    name: str | None,
    optuna: int | None,
    minimize: list[str] | None,
    maximize: list[str] | None,
    subject_to: list[str] | None,
) -> str:
    """Return the command that was typed."""
    words = ["quantline", "sweep", *overrides]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    words += ["--name", name] if name else []
    words += ["--optuna", str(optuna)] if optuna else []
    for option, values in (
        ("--minimize", minimize),
        ("--maximize", maximize),
        ("--subject-to", subject_to),
    ):
        for value in values or []:
            words += [option, value]
    return shlex.join(words)
