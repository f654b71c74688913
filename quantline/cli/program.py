"""The program that the commands belong to, how it ends on an error, and how it runs modules."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from quantline.causes import advice_on, failure_of
from quantline.errors import ConfigError, StageError
from quantline.messages import guard_libraries, say
from quantline.paths import REPORTS
from quantline.run.leash import leashed
from quantline.run.process_tree import end_tree
from quantline.run.signals import AGAIN, Terminated, ends_on_request

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
        except BrokenPipeError:
            raise  # who read the output has read enough, such as `head`: click ends without a word
        except OSError as error:
            say(f"{failure_of(error)}: {error}{advice_on(error)}", error=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Program,
    help="A trained language model in; measured, deployable quantized variants out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides, such as suite=quick or model=local model.path=/models/mine",
        show_default=False,
    ),
]


def examples(*commands: str) -> str:
    """Return what stands below a command's help: calls of it, a line each."""
    return "\n\n".join(["Examples:", *(f"  {command}" for command in commands)])


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"quantline {version_of('quantline')}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version"),
    ] = False,
) -> None:
    """A trained language model in; measured, deployable quantized variants out."""


def stop(error: ConfigError | StageError) -> typer.Exit:
    """Print an error with its name; return what ends the command."""
    say(f"{error.failure}: {error}", error=True)
    return typer.Exit(1)


def python_first() -> dict[str, str]:
    """Return this environment, in which `python` is this one, also where no .venv/ is activated."""
    folder = str(Path(sys.executable).parent)
    return os.environ | {"PATH": os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])}


def run_module(module: str, *arguments: str) -> int:
    """Run a module with this Python and return its exit code.

    `python` in dvc.yaml is this one too. The module ends with this process. If this process is
    asked to end, all that the module has started ends first.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command,
        env=python_first(),
        preexec_fn=leashed(),  # noqa: PLW1509  the commands have one thread
    )
    try:
        return process.wait()
    except BaseException:
        end_tree(process)
        raise


@contextlib.contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Let the block end on Ctrl-C or SIGTERM with a line that says how to go on.

    Raises:
        typer.Exit: With the exit code of the signal.
    """
    try:
        with ends_on_request():
            yield
    except (KeyboardInterrupt, Terminated) as error:
        how = f"asked to end ({error})" if isinstance(error, Terminated) else "stopped by Ctrl-C"
        say(f"{how}, and nothing is running any more; {AGAIN}", error=True)
        number = error.exit_code if isinstance(error, Terminated) else 128 + signal.SIGINT
        raise typer.Exit(number) from None
