"""`quantline init`: a project's own choice, kept in conf/experiment/."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantline.cli.compose import compose_project
from quantline.cli.program import app, examples, stop
from quantline.config.catalogue import names_of
from quantline.config.compose import present_params, project_root
from quantline.config.first_choices import (
    DEMO,
    HUB,
    NO_GOLD,
    model_overrides,
    project_overrides,
    text_overrides,
)
from quantline.errors import ConfigError
from quantline.messages import say
from quantline.run.project_lock import project_lock


@app.command(
    epilog=examples(
        "quantline init      (asks, on a terminal)",
        "quantline init --model /models/mine --calibration train.txt --evaluation test.txt",
        "quantline init --model Qwen/Qwen3-0.6B --calibration hub --target edge --suite quick",
        "quantline init model=local model.path=/models/mine calibration=hub evaluation=hub",
    )
)
def init(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="The project's folder, if it is not this one, and Hydra overrides",
            metavar="[FOLDER] [OVERRIDES]...",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a GGUF file, owner/name[@revision] on the Hub, or a name of conf/model",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="The text to calibrate on: a file, a data set on the Hub, or a name of "
            "conf/calibration",
            show_default=False,
        ),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            help="The text to measure on; else the other half of the same file",
            show_default=False,
        ),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(help="Questions with answers, JSON lines; none for none", show_default=False),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Where you deploy: a name of conf/target", show_default=False)
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Which recipes and variants: a name of conf/suite", show_default=False),
    ] = None,
    name: Annotated[str, typer.Option(help="What the choice is called")] = "mine",
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the files of a choice of that name")
    ] = False,
) -> None:
    """Keep a project's own choices in conf/experiment/, as what every composition starts from.

    Asks for them on a terminal, if nothing is given.
    """
    from quantline.config.experiment import NONE, write_experiment

    try:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == NONE:
            raise ConfigError(
                f"expected a name of a-z, 0-9, _ and - other than {NONE}, found {name!r}"
            )
        folder, overrides = _folder_and_overrides(arguments or [])
        root = project_root(folder)
        said: dict[str, str | None] = {
            **{"model": model, "calibration": calibration, "evaluation": evaluation},
            **{"gold": gold, "target": target, "suite": suite},
        }
        nothing = not overrides and all(one is None for one in said.values())
        if nothing and sys.stdin.isatty():
            said = ask(root)
        elif nothing:
            raise ConfigError(
                "expected a choice, found none; give options or overrides, such as "
                "--model /models/mine --calibration train.txt, or call it on a terminal: there it "
                "asks"
            )
        # Paths are those of the folder in which the command was called.
        overrides = project_overrides(root, **said) + overrides
        os.chdir(root)
        with project_lock("quantline init"):
            for path in write_experiment(root, name, overrides, present_params(), replace):
                say(f"wrote {path}")
            compose_project([])
    except ConfigError as error:
        raise stop(error) from None
    say(f"`quantline repro` and `dvc exp run -S ...` start from conf/experiment/{name}.yaml")
    say("`quantline doctor` says what that takes: memory, disk and time")


def _folder_and_overrides(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Tell the project's folder, if one is named, from the overrides."""
    first = arguments[0] if arguments else "="
    if "=" in first or first.startswith(("~", "+")):
        return None, arguments
    folder = Path(first)
    if not folder.is_dir():
        raise ConfigError(
            f"expected the folder of a project, or an override key=value, found {first!r}; a "
            "project is a clone of quantline's repository: `git clone` it to that folder first"
        )
    return folder, arguments[1:]


def ask(root: Path) -> dict[str, str | None]:
    """Ask for a project's choices; a wrong answer is asked for again.

    Args:
        root: The project's.
    """
    say("Enter takes what stands in brackets. `quantline list` tells what there is.")
    model = _ask(
        "Model: a folder, a GGUF file, owner/name on the Hub, or a ready one",
        DEMO,
        lambda said: model_overrides(said, root),
    )
    own = model != DEMO
    calibration = _ask(
        "Text to calibrate on: a file, a data set on the Hub, hub for WikiText-2",
        HUB if own else DEMO,
        lambda said: text_overrides("calibration", said, root),
    )
    evaluation = _ask(
        "Text to measure on (the same file: its other half)",
        calibration,
        lambda said: text_overrides("evaluation", said, root),
    )
    gold: str | None = _ask(
        "Questions with known answers, JSON lines (none for none)",
        NO_GOLD if own else DEMO,
        lambda said: said == DEMO or project_overrides(root, gold=said),
    )
    target = _ask(
        f"Where you deploy ({', '.join(names_of(root, 'target'))})",
        "laptop-cpu",
        lambda said: project_overrides(root, target=said),
    )
    suite = _ask(
        f"Which variants ({', '.join(names_of(root, 'suite'))})",
        "default",
        lambda said: project_overrides(root, suite=said),
    )
    return {
        **{"model": model, "calibration": calibration, "evaluation": evaluation},
        **{"gold": None if gold == DEMO else gold, "target": target, "suite": suite},
    }


def _ask(question: str, default: str, check: Callable[[str], Any]) -> str:
    """Ask until the answer is one that can be taken."""
    while True:
        answer = str(typer.prompt(question, default=default)).strip()
        try:
            check(answer)
        except ConfigError as error:
            say(error, error=True)
            continue
        return answer
