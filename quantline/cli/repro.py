"""`quantline repro`: compose, run the pipeline, show the comparison."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from quantline.cli.compose import compose_project
from quantline.cli.dvc import run_dvc
from quantline.cli.program import (
    COMPARISON,
    PAGE,
    PARAMS,
    Overrides,
    app,
    ends_in_one_line,
    run_module,
    stop,
)
from quantline.cli.side_by_side import SHARED, run_side_by_side
from quantline.config.compose import load_params, project_root
from quantline.config.params import Params
from quantline.errors import ConfigError
from quantline.files import as_json
from quantline.messages import say
from quantline.run.deliverer import delivering
from quantline.run.dvc_program import has_git
from quantline.run.model_elsewhere import is_model_elsewhere
from quantline.run.project_lock import project_lock
from quantline.run.result_folders import check_result_folders

DVC_FOLDER = Path(".dvc")


@app.command()
def repro(
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="Recipes and exports at once")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB that they may hold together (four fifths of what is free)",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compose, run the pipeline, and show the comparison (also when a variant has failed)."""
    try:
        os.chdir(project_root())
        with ends_in_one_line(), project_lock("quantline repro"):
            _check_tree()
            compose_project(overrides or [], keeps_project=True)
            _run_and_show(jobs, memory)
    except ConfigError as error:
        raise stop(error) from None


def _check_tree() -> None:
    """Check that the project came with what DVC needs; say what a tree without git cannot do.

    Raises:
        ConfigError: If it did not.
    """
    if not (DVC_FOLDER / "config").is_file():
        raise ConfigError(
            f"expected {DVC_FOLDER}/config in {Path.cwd()}, found none: the project was copied "
            f"without its hidden files; copy {DVC_FOLDER}/ and .dvcignore too"
        )
    check_result_folders()
    if not has_git(Path.cwd()):
        say("no git repository here: `dvc exp` and `dvc repro` by themselves need `git init`")


def _run_and_show(jobs: int, memory: float | None) -> None:
    """Run what is not up to date, and print the comparison.

    Args:
        jobs: How many recipes and exports run at once.
        memory: GiB that they may hold together.

    Raises:
        typer.Exit: With 1, if anything failed.
    """
    # The page there may be of an earlier run: if this one makes none, none is shown.
    before = COMPARISON.stat().st_mtime_ns if COMPARISON.is_file() else None
    params = load_params(PARAMS)
    elsewhere = is_model_elsewhere(params, Path.cwd())
    options = ["--allow-missing"] if elsewhere else []
    if elsewhere:
        say(f"{params.model.path} is not here: what dvc.lock says of the model is up to date")
    with delivering():
        if jobs > 1 and not elsewhere:
            failed, refused = _run_side_by_side(params, jobs, memory)
        else:
            failed, refused = run_dvc("repro", "--keep-going", *options)
        if not failed and _make_stale_again():
            failed, refused = run_dvc("repro", "--keep-going", *options)
    # DVC does not run compare after a failure upstream, nor where a file changed behind its back.
    # Without the model, a new comparison would know less than the one that was pulled.
    present = COMPARISON.is_file() if elsewhere else _is_present()
    if failed or not present:
        run_module("stages.compare", *refused)
        if not COMPARISON.is_file() or COMPARISON.stat().st_mtime_ns == before:
            say(
                "no comparison could be made; the errors are above, and in events.jsonl", error=True
            )
            raise typer.Exit(1)
    from quantline.report.terminal import print_report

    report = json.loads(COMPARISON.read_text(encoding="utf-8"))
    print_report(report)
    say(f"Page: {PAGE.resolve()}")
    for row in report["variants"]:
        if row["status"] != "ok":
            say(f"{row['variant']}: {row['message']}", error=True)
            failed = failed or 1
    if failed:
        say("something failed: the page and events.jsonl name it", error=True)
        raise typer.Exit(1)


def _run_side_by_side(params: Params, jobs: int, memory: float | None) -> tuple[int, list[str]]:
    """Run the pipeline with recipes and exports side by side.

    Returns:
        As `run_dvc` does.
    """
    failed, refused = run_dvc("repro", *SHARED)
    if failed:
        return failed, refused
    beside = run_side_by_side(params, jobs, memory)
    if not beside.failed:
        return run_dvc("repro", "--keep-going")
    # What has failed would fail again, so that the others alone are evaluated.
    left = [f"evaluate@{name}" for name in params.variants if f"export@{name}" not in beside.failed]
    if left:
        refused = run_dvc("repro", "--keep-going", *left)[1]
    return 1, beside.refused + refused


def _make_stale_again() -> bool:
    """Run the stages that DVC takes for up to date, though their inputs are others.

    Returns:
        Whether there were any.
    """
    from quantline.report.chain import stale_stages

    links = stale_stages(load_params(PARAMS))
    for link in links:
        say(f"{link.stage} runs again: {link.reason}")
        run_dvc("repro", "--force", "--single-item", link.stage)
    return bool(links)


def _is_present() -> bool:
    """Whether the comparison on disk is what the files on disk say, hashed anew."""
    from quantline.report.build import build_report

    if not COMPARISON.is_file():
        return False
    try:
        written = json.loads(COMPARISON.read_text(encoding="utf-8"))
    except ValueError:
        return False
    present = json.loads(as_json(build_report(load_params(PARAMS))))
    # Another commit may hold the same files.
    apart = {"commit": None, "uncommitted": None}
    return isinstance(written, dict) and written | apart == present | apart
