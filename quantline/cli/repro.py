"""`quantline repro`: compose, run the pipeline, show the comparison."""

import json
import os

import typer

from quantline.cli.compose import compose_project
from quantline.cli.program import COMPARISON, PAGE, PARAMS, Overrides, app, run_module, stop
from quantline.config.compose import load_params, project_root
from quantline.errors import ConfigError
from quantline.files import as_json
from quantline.messages import say
from quantline.run.project_lock import project_lock


@app.command()
def repro(overrides: Overrides = None) -> None:
    """Compose, run the pipeline, and show the comparison (also when a variant has failed)."""
    try:
        os.chdir(project_root())
        with project_lock("quantline repro"):
            compose_project(overrides or [])
            _run_and_show()
    except ConfigError as error:
        raise stop(error) from None


def _run_and_show() -> None:
    """Run what is not up to date, and print the comparison.

    Raises:
        typer.Exit: With 1, if anything failed.
    """
    # The page there may be of an earlier run: if this one makes none, none is shown.
    before = COMPARISON.stat().st_mtime_ns if COMPARISON.is_file() else None
    failed = run_module("dvc", "repro", "--keep-going")
    if not failed and _make_stale_again():
        failed = run_module("dvc", "repro", "--keep-going")
    # DVC does not run compare after a failure upstream, nor where a file changed behind its back.
    if failed or not _is_present():
        run_module("stages.compare")
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


def _make_stale_again() -> bool:
    """Run the stages that DVC takes for up to date, though their inputs are others.

    Returns:
        Whether there were any.
    """
    from quantline.report.chain import stale_stages

    links = stale_stages(load_params(PARAMS))
    for link in links:
        say(f"{link.stage} runs again: {link.reason}")
        run_module("dvc", "repro", "--force", "--single-item", link.stage)
    return bool(links)


def _is_present() -> bool:
    """Whether the comparison on disk is what the files on disk say, hashed anew."""
    from quantline.report.build import build_report

    if not COMPARISON.is_file():
        return False
    written = json.loads(COMPARISON.read_text(encoding="utf-8"))
    present = json.loads(as_json(build_report(load_params(PARAMS))))
    # Another commit may hold the same files.
    return written | {"commit": None} == present | {"commit": None}
