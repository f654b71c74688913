"""`quantline doctor`: what is missing or stale, and what the configured run will take."""

import os
import shutil
from importlib.metadata import version
from pathlib import Path

import typer

from quantline.cli.program import PARAMS, app, examples, stop
from quantline.config.compose import load_params, missing_inputs, project_root
from quantline.config.params import Params
from quantline.config.stale import check_fresh
from quantline.config.watched import broken_links
from quantline.errors import ConfigError
from quantline.files import MIB
from quantline.messages import say
from quantline.paths import EVENTS
from quantline.run.dvc_program import has_git
from quantline.run.memory import available_bytes
from quantline.run.progress import duration

LONGEST = 5  # stages that are named with their time


@app.command(
    epilog=examples("quantline doctor", "quantline compose suite=full && quantline doctor")
)
def doctor() -> None:
    """Say what is missing or stale, and what the run will take: memory, disk and time.

    Exit code 1 if something has to be mended first.
    """
    try:
        os.chdir(project_root())
    except ConfigError as error:
        raise stop(error) from None
    problems = _installed()
    params = _configuration(problems)
    if params is not None:
        _needs(params, problems)
    for problem in problems:
        say(f"to mend: {problem}", error=True)
    raise typer.Exit(int(bool(problems)))


def _installed() -> list[str]:
    """Say what is installed; return what has to be mended."""
    from quantline.doctor.packages import missing_extras, missing_requirements, missing_runtimes

    say(f"quantline {version('quantline')} in {Path.cwd()}")
    problems = [
        f"expected {one.what}, found {one.found}: {one.remedy}" for one in missing_requirements()
    ]
    if not problems:
        say("packages: all that quantline needs, in the versions it names")
    for one in (*missing_extras(), *missing_runtimes().values()):
        say(f"not installed: {one.what} ({one.found}): {one.remedy}")
    return problems


def _configuration(problems: list[str]) -> Params | None:
    """Say how it stands with params.yaml; add what has to be mended."""
    from quantline.doctor.packages import missing_for, missing_runtimes

    if not (Path(".dvc") / "config").is_file():
        problems.append(f"expected .dvc/config in {Path.cwd()}, found none: copy hidden files too")
    if not has_git(Path.cwd()):
        say("no git repository here: `dvc exp` and `dvc repro` by themselves need `git init`")
    try:
        params = load_params(PARAMS)
    except ConfigError as error:
        problems.append(str(error))
        return None
    try:
        check_fresh(params)
    except ConfigError as error:
        problems.append(str(error))
    problems += [*missing_inputs(params), *broken_links(params)]
    problems += missing_for(params)
    absent = missing_runtimes()
    for name, variant in params.variants.items():
        elsewhere = params.evaluation.pythons.get(variant.runtime)
        if variant.runtime in absent and not elsewhere:
            remedy = absent[variant.runtime].remedy
            problems.append(f"variants.{name}: {variant.runtime} is not installed: {remedy}")
    model = params.model
    say(
        f"configuration: model {model.id or model.path}, suite {params.suite} with "
        f"{len(params.recipes)} recipes and {len(params.variants)} variants, target "
        f"{params.target.name}"
    )
    return params


def _needs(params: Params, problems: list[str]) -> None:
    """Say what the run takes; add what this machine does not have."""
    from quantline.doctor.needs import machine_flops, needs_of, seconds_before
    from quantline.doctor.sizes import sizes_of_project

    sizes = sizes_of_project(params, Path.cwd())
    if sizes is None:
        say(
            "needs: cannot be told before the model is here; `dvc repro load` fetches it, and "
            "`quantline doctor` then tells them"
        )
        return
    flops = machine_flops()
    needs = needs_of(params, sizes, flops, seconds_before(EVENTS))
    say(
        f"model: {sizes.parameters / 1e6:.1f} M parameters, {sizes.blocks} blocks, "
        f"{sizes.file_bytes / MIB:.0f} MiB"
    )
    say(f"this machine: {flops / 1e9:.0f} billion operations a second, as busy as it is now")
    total = sum(needs.seconds.values())
    say(f"time: about {duration(total)} for a whole run; what is up to date takes none of it")
    slow = sorted(needs.seconds, key=lambda stage: -needs.seconds[stage])[:LONGEST]
    for stage in slow:
        how = "as measured before" if stage in needs.measured else "estimated"
        say(f"  {stage}: {duration(needs.seconds[stage])}, {how}")
    available = available_bytes()
    say(
        f"memory: about {needs.memory_bytes / MIB:,.0f} MiB for {needs.memory_of}; "
        f"{available / MIB:,.0f} MiB are free"
    )
    free = shutil.disk_usage(Path.cwd()).free
    say(
        f"disk: about {needs.disk_bytes / MIB:,.0f} MiB, and while it calibrates "
        f"{needs.peak_disk_bytes / MIB:,.0f} MiB; {free / MIB:,.0f} MiB are free"
    )
    if not needs.memory_bytes <= available:
        problems.append(
            f"{needs.memory_of} needs more memory than is free: close other programs, leave "
            "variants out, or take fewer or shorter sequences (calibration.sequences)"
        )
    if not needs.peak_disk_bytes <= free:
        problems.append(
            "the run needs more disk than is free: make room, or take fewer sequences or variants"
        )
    limit = params.limits.seconds
    longest = max(needs.seconds.values())
    if limit is not None and not longest <= limit:
        problems.append(
            f"{slow[0]} would be ended after {duration(limit)} (limits.seconds): raise that limit"
        )
