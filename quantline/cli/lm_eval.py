"""`quantline lm-eval`: tasks of lm-evaluation-harness on variants that are built."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantline.cli.dvc import run_dvc
from quantline.cli.program import PAGE, app, ends_in_one_line, run_module, stop
from quantline.config.compose import project_root
from quantline.errors import ConfigError
from quantline.messages import say


@app.command("lm-eval")
def lm_eval(
    variants: Annotated[
        list[str], typer.Argument(help="Variants that are built", show_default=False)
    ],
    tasks: Annotated[
        str, typer.Option(help="Names of tasks or groups, separated by commas: arc_easy,hellaswag")
    ],
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder of your own tasks (YAML files)", show_default=False),
    ] = None,
    fewshot: Annotated[
        int | None,
        typer.Option(
            help="Examples before each question; else as the task says", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task; else all", show_default=False)
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the questions through the model's chat template")
    ] = False,
    max_length: Annotated[
        int | None,
        typer.Option(help="Context length in tokens; else the model's own", show_default=False),
    ] = None,
) -> None:
    """Run tasks of lm-evaluation-harness (the extra lm-eval) on variants; the page shows them."""
    options = {
        "tasks": tasks,
        "include-path": include_path and include_path.resolve(),
        "fewshot": fewshot,
        "limit": limit,
        "max-length": max_length,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    arguments += ["--chat"] * chat
    try:
        os.chdir(project_root())
    except ConfigError as error:
        raise stop(error) from None
    with ends_in_one_line():
        failed = [name for name in variants if run_module("stages.lm_eval", name, *arguments)]
    measured = len(failed) < len(variants)
    if measured and not run_dvc("repro", "--quiet", "--single-item", "compare")[0]:
        say(f"Page: {PAGE.resolve()}")
    if failed:
        say(f"failed: {', '.join(failed)}", error=True)
        raise typer.Exit(1)
