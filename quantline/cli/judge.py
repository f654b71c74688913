"""`quantline pick` and `quantline gate`: answers from what is measured; nothing runs."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantline.cli.program import PARAMS, app, stop
from quantline.config.compose import compose, load_params, project_root
from quantline.config.overrides import for_hydra
from quantline.config.params import Params
from quantline.config.stale import check_fresh
from quantline.config.validation import validate
from quantline.errors import ConfigError, StageError
from quantline.messages import say
from quantline.metrics.target_metrics import check_metrics

TARGET = "target"


@app.command()
def pick(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="The target, and what to change in it: target=edge target.max_memory_mib=512",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Which variant to ship for a target: an answer from what is measured; nothing is run."""
    from quantline.report.terminal import print_report

    try:
        params = _params_for_target(overrides or [])
    except ConfigError as error:
        raise stop(error) from None
    report = _report(params)
    print_report(report)
    for row in report["variants"]:
        if row["variant"] != report["pick"]:
            say(f"  {row['variant']}: {row['message'] or '; '.join(row['why_not'])}")
    # That no variant meets a target is an answer; that there are no figures to ask is none.
    if all(row["status"] != "ok" for row in report["variants"]):
        raise typer.Exit(1)


def _report(params: Params) -> dict[str, Any]:
    """Return the report on what is on disk; end the command if it cannot be made."""
    from quantline.report.build import build_report

    try:
        return build_report(params)
    except StageError as error:
        raise stop(error) from None


def _params_for_target(overrides: list[str]) -> Params:
    """Return params.yaml with its target changed by overrides. Raises ConfigError."""
    others = [override for override in overrides if not re.match(r"[+~]*target\b", override)]
    if others:
        raise ConfigError(
            "pick changes the target alone: expected target=... or target.<key>=..., found "
            f"{others[0]}"
        )
    os.chdir(project_root())
    params = load_params(PARAMS)
    check_fresh(params)
    if overrides:
        params = _with_target(params, overrides)
        check_metrics(params)
    return params


def _with_target(params: Params, overrides: list[str]) -> Params:
    """Return parameters with another target of conf/, or with some keys of theirs changed.

    What params.yaml says of its target may have been an override, which conf/ does not have.

    Raises:
        ConfigError: If the overrides do not fit.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    composed = validate(compose(overrides))
    parsed = OverridesParser.create().parse_overrides(for_hydra(overrides, Path("conf")))
    if any(override.key_or_group == TARGET for override in parsed):
        return params.model_copy(update={TARGET: composed.target})
    values = params.model_dump(mode="json")
    for override in parsed:
        place = values
        *sections, last = override.key_or_group.split(".")
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        if override.is_delete():
            place.pop(last, None)
        else:
            place[last] = override.value()
    return params.model_copy(update={TARGET: validate(values).target})


@app.command()
def gate(
    variant: Annotated[
        str | None, typer.Argument(help="The variant; without it, the pick", show_default=False)
    ] = None,
    cannot_tell: Annotated[
        Literal["estimate", "passes", "fails"] | None,
        typer.Option(
            help="How to count a gate whose interval contains the threshold; overrides each "
            "gate's cannot_tell",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Exit with 1 unless the pick, or the named variant, meets the target of params.yaml."""
    try:
        os.chdir(project_root())
        params = load_params(PARAMS)
        check_fresh(params)
        if variant and variant not in params.variants:
            names = ", ".join(params.variants)
            raise ConfigError(f"expected a variant among {names}, found {variant}")
    except ConfigError as error:
        raise stop(error) from None
    if cannot_tell:
        gates = [
            gate.model_copy(update={"cannot_tell": cannot_tell}) for gate in params.target.gates
        ]
        target = params.target.model_copy(update={"gates": gates})
        params = params.model_copy(update={"target": target})
    report = _report(params)
    name = variant or report["pick"]
    if name is None:
        say(f"no variant meets the target {params.target.name}", error=True)
        for row in report["variants"]:
            reason = row["message"] or "; ".join(row["objections"])
            say(f"{row['variant']}: {reason}", error=True)
        raise typer.Exit(1)
    row = next(row for row in report["variants"] if row["variant"] == name)
    for checked in row["gates"]:
        required = "required" if checked["required"] else "optional"
        say(f"{checked['verdict']:11} {required}  {checked['said']}")
    for objection in row["objections"]:
        say(f"{name}: {objection}", error=True)
    if row["message"]:
        say(f"{name}: {row['message']}", error=True)
    meets = not row["objections"]
    verb = "meets" if meets else "does not meet"
    say(f"{name} {verb} the target {params.target.name}", error=not meets)
    raise typer.Exit(0 if meets else 1)
