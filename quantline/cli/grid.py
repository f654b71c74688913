"""`quantline grid`: files for all combinations of a method's options."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from quantline.cli.program import app, stop
from quantline.config.compose import project_root
from quantline.errors import ConfigError
from quantline.messages import say
from quantline.run.project_lock import project_lock


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def grid(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="The method of the recipes, such as gptq")],
    format: Annotated[
        str | None,
        typer.Option(help="The variants' format; else the method's own", show_default=False),
    ] = None,
    suite: Annotated[str, typer.Option(help="The suite that they are added to")] = "sweep",
) -> None:
    """Write recipe, variant and suite files for all combinations of a method's options.

    Each further option takes values separated by commas: quantline grid gptq --bits 3,4
    --group-size 32,128
    """
    from quantline.config.grid import write_grid

    try:
        options = grid_options(context.args)
        if not re.fullmatch(r"[\w.-]+", suite) or suite.startswith("."):
            raise ConfigError(
                "expected a suite's name of letters, digits, dots, hyphens and underscores, found "
                f"{suite}"
            )
        os.chdir(project_root())
        with project_lock("quantline grid"):
            points = write_grid(Path("conf"), method, options, format, suite)
    except ConfigError as error:
        raise stop(error) from None
    for point in points:
        say(f"recipe {point.recipe}, variant {point.variant}")
    say(f"conf/suite/{suite}.yaml has them: quantline repro suite={suite}")


def grid_options(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Read `--group-size 32,128` or `--group-size=32,128` as {"group_size": [32, 128]}.

    Raises:
        ConfigError: For anything else.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if len(words) % 2:
        raise ConfigError(f"expected --option value,value,…, found {words[-1]} without a value")
    options: dict[str, list[Any]] = {}
    for name, values in zip(words[::2], words[1::2], strict=True):
        if not name.startswith("--"):
            raise ConfigError(f"expected --option value,value,…, found {name}")
        key = name.removeprefix("--").replace("-", "_")
        if key in options:
            raise ConfigError(
                f"expected all values of {name} once, separated by commas, found it twice"
            )
        try:
            options[key] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError as error:
            raise ConfigError(f"expected values separated by commas for {name}: {error}") from None
        if not options[key]:
            raise ConfigError(f"expected values separated by commas for {name}, found none")
    return options
