"""`quantline init`: a project's own choice, kept in conf/experiment/."""

import os
import re
from typing import Annotated

import typer

from quantline.cli.compose import compose_project
from quantline.cli.program import Overrides, app, stop
from quantline.config.compose import present_params, project_root
from quantline.errors import ConfigError
from quantline.messages import say
from quantline.run.project_lock import project_lock


@app.command()
def init(
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="What the choice is called")] = "mine",
) -> None:
    """Keep overrides in conf/experiment/, so that compose, repro and sweeps start from them."""
    from quantline.config.experiment import NONE, write_experiment

    try:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == NONE:
            raise ConfigError(
                f"expected a name of a-z, 0-9, _ and - other than {NONE}, found {name!r}"
            )
        root = project_root()
        os.chdir(root)
        with project_lock("quantline init"):
            for path in write_experiment(root, name, overrides or [], present_params()):
                say(f"wrote {path}")
            compose_project([])
    except ConfigError as error:
        raise stop(error) from None
    say(f"`quantline repro` and `dvc exp run -S ...` start from conf/experiment/{name}.yaml")
