"""The program that the commands belong to, how it ends on an error, and how it runs modules."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantline.errors import ADVICE, ConfigError, StageError, failure_of
from quantline.messages import guard_libraries, say
from quantline.paths import REPORTS

PARAMS = Path("params.yaml")
COMPARISON = REPORTS / "compression.json"
PAGE = REPORTS / "compression.html"

guard_libraries()


class Program(TyperGroup):
    """The commands, each of which ends what it could not foresee with the failure's name."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (ConfigError, StageError) as error:
            raise stop(error) from None
        except OSError as error:
            failure = failure_of(error)
            advice = f"; {ADVICE[failure]}" if failure in ADVICE else ""
            say(f"{failure}: {error}{advice}", error=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Program,
    help="A trained language model in; measured, deployable quantized variants out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides, such as suite=quick or model=local model.path=/models/mine",
        show_default=False,
    ),
]


def stop(error: ConfigError | StageError) -> typer.Exit:
    """Print an error with its name; return what ends the command."""
    say(f"{error.failure}: {error}", error=True)
    return typer.Exit(1)


def run_module(module: str, *arguments: str) -> int:
    """Run a module with this Python and return its exit code.

    `python` in dvc.yaml is this one too, also where .venv/ is not activated.
    """
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, env=os.environ | {"PATH": path}, check=False).returncode
