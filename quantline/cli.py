"""The command `quantline`.

    quantline compose [OVERRIDES...]     conf/ -> params.yaml
    quantline repro   [OVERRIDES...]     compose, `dvc repro --keep-going`, then the comparison
    quantline pick    [target=... ...]   which variant to ship for a target, from what was measured
    quantline gate    [VARIANT]          exit code 1 unless the pick, or the variant, meets the target
    quantline lm-eval VARIANTS... --tasks ...    tasks of lm-evaluation-harness on variants that are built

Overrides are Hydra's: `suite=quick`, `model=local model.path=/models/mine`, `recipes.gptq-w4g128.bits=3`,
`+variant=[gguf-f16]` (one more variant), `variant=[bf16,gguf-q4_k_m]` (these variants alone). Each call starts from
conf/ anew: overrides of an earlier call are not remembered.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantline.config.compose import (
    as_yaml,
    check_fresh,
    compose,
    differences,
    load_params,
    missing_inputs,
    project_root,
)
from quantline.config.section import ConfigError
from quantline.config.validation import validate
from quantline.files import write_text

app = typer.Typer(help="A trained language model in; measured, deployable quantized variants out.",
                  no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Overrides = Annotated[list[str] | None, typer.Argument(
    help="Hydra overrides, such as suite=quick or model=local model.path=/models/mine", show_default=False)]
PARAMS, COMPARISON, PAGE = Path("params.yaml"), Path("reports/compression.json"), Path("reports/compression.html")

COLUMNS = (  # title, key of the metric, what to multiply it with, form
    ("MiB", "size_bytes", 2**-20, ".1f"),
    ("bits/w", "bits_per_weight", 1, ".2f"),
    ("ppl", "perplexity", 1, ".3f"),
    ("KLD", "mean_kld", 1, "z.5f"),
    ("top %", "same_top_p", 100, ".1f"),
    ("gold %", "gold_accuracy", 100, ".1f"),
    ("tok/s", "decode_tok_s", 1, ".0f"),
    ("RAM MiB", "peak_rss_mib", 1, ".0f"),
)


@app.command("compose")
def compose_command(overrides: Overrides = None) -> None:
    """Compose conf/ into params.yaml and say what changes."""
    try:
        _compose(overrides or [])
    except ConfigError as error:
        raise _stop(error) from None


@app.command()
def repro(overrides: Overrides = None) -> None:
    """Compose, run the pipeline, and show the comparison (also when a variant has failed)."""
    try:
        _compose(overrides or [])
    except ConfigError as error:
        raise _stop(error) from None
    # The page there may be of an earlier run: if this one makes none, none is shown.
    before = COMPARISON.stat().st_mtime_ns if COMPARISON.is_file() else None
    failed = _run("dvc", "repro", "--keep-going")
    if failed:
        # DVC does not run compare after a failure upstream; the page should name that failure.
        _run("stages.compare")
        if not COMPARISON.is_file() or COMPARISON.stat().st_mtime_ns == before:
            typer.echo("no comparison could be made; the errors are above, and in events.jsonl", err=True)
            raise typer.Exit(1)
    show(json.loads(COMPARISON.read_text(encoding="utf-8")))
    typer.echo(f"Page: {PAGE.resolve()}")
    if failed:
        typer.echo("something failed: the page and events.jsonl name it", err=True)
        raise typer.Exit(1)


@app.command()
def pick(overrides: Annotated[list[str] | None, typer.Argument(
        help="The target, and what to change in it: target=edge target.max_memory_mib=512",
        show_default=False)] = None) -> None:
    """Which variant to ship for a target: an answer from what is measured, without running anything."""
    from stages.compare import build

    try:
        if strange := [one for one in overrides or [] if not re.match(r"[+~]*target\b", one)]:
            raise ConfigError("pick changes the target alone: expected target=... or target.<key>=..., found "
                              f"{strange[0]}")
        os.chdir(project_root())
        params = load_params(PARAMS)
        if overrides:
            params = params.model_copy(update={"target": validate(compose(overrides)).target})
    except ConfigError as error:
        raise _stop(error) from None
    report = build(params)
    show(report)
    for row in report["variants"]:
        if row["variant"] != report["pick"]:
            typer.echo(f"  {row['variant']}: {'; '.join(row['why_not'])}")


@app.command()
def gate(
    variant: Annotated[str | None, typer.Argument(help="The variant; without it, the pick", show_default=False)] = None,
    cannot_tell: Annotated[Literal["estimate", "passes", "fails"] | None, typer.Option(
        help="What a gate that cannot tell counts as, in place of what each gate says", show_default=False)] = None,
) -> None:
    """Exit with 1 unless the pick, or the named variant, meets the target of params.yaml: for CI."""
    from stages.compare import build

    try:
        os.chdir(project_root())
        params = load_params(PARAMS)
        check_fresh(params)
        if variant and variant not in params.variants:
            raise ConfigError(f"expected a variant among {', '.join(params.variants)}, found {variant}")
    except ConfigError as error:
        raise _stop(error) from None
    if cannot_tell:
        asked = [one.model_copy(update={"cannot_tell": cannot_tell}) for one in params.target.gates]
        params = params.model_copy(update={"target": params.target.model_copy(update={"gates": asked})})
    report = build(params)
    name, target = variant or report["pick"], params.target.name
    if name is None:
        typer.echo(f"no variant meets the target {target}", err=True)
        raise typer.Exit(1)
    row = next(row for row in report["variants"] if row["variant"] == name)
    for one in row["gates"]:
        typer.echo(f"{one['verdict']:11} {'required' if one['required'] else 'optional'}  {one['said']}")
    for objection in row["objections"]:
        typer.echo(f"{name}: {objection}", err=True)
    meets = not row["objections"]
    typer.echo(f"{name} {'meets' if meets else 'does not meet'} the target {target}", err=not meets)
    raise typer.Exit(0 if meets else 1)


@app.command("lm-eval")
def lm_eval(
    variants: Annotated[list[str], typer.Argument(help="Variants that are built", show_default=False)],
    tasks: Annotated[str, typer.Option(help="Names of tasks or groups, parted by commas: arc_easy,hellaswag")],
    include_path: Annotated[Path | None, typer.Option(
        help="A folder of your own tasks (YAML files)", show_default=False)] = None,
    fewshot: Annotated[int | None, typer.Option(
        help="Examples before each question; else as the task says", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; else all", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the questions through the model's chat template")] = False,
    max_length: Annotated[int | None, typer.Option(
        help="Tokens that the model looks at; else as it says", show_default=False)] = None,
) -> None:
    """Tasks of lm-evaluation-harness (the extra lm-eval) on variants; the results stand on the page."""
    options = {"tasks": tasks, "include-path": include_path and include_path.resolve(), "fewshot": fewshot,
               "limit": limit, "max-length": max_length}
    given = [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--chat"] * chat
    try:
        os.chdir(project_root())
    except ConfigError as error:
        raise _stop(error) from None
    failed = [name for name in variants if _run("stages.lm_eval", name, *given)]
    if len(failed) < len(variants) and not _run("dvc", "repro", "--quiet", "--single-item", "compare"):
        typer.echo(f"Page: {PAGE.resolve()}")
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)


def _stop(error: ConfigError) -> typer.Exit:
    typer.echo(f"config_invalid: {error}", err=True)
    return typer.Exit(1)


def _compose(overrides: list[str]) -> None:
    """Write params.yaml, from the project's root. Raises ConfigError, and then leaves params.yaml as it was."""
    os.chdir(project_root())
    composed = compose(overrides)
    params = validate(composed)
    if missing := missing_inputs(params):
        raise ConfigError("\n".join(missing))
    try:
        changes = differences(load_params(PARAMS), params)
    except ConfigError:  # none yet, or one that an older version wrote
        changes = ["params.yaml: new"]
    text = as_yaml(composed)
    if not PARAMS.is_file() or PARAMS.read_text(encoding="utf-8") != text:
        write_text(PARAMS, text)
    for change in changes:
        typer.echo(change)
    typer.echo(f"params.yaml: suite {params.suite}, {len(params.recipes)} recipes, {len(params.variants)} variants, "
               f"{'changed' if changes else 'as before'}")


def _run(module: str, *arguments: str) -> int:
    """Run a module with this Python; `python` in dvc.yaml is this one too, also where .venv/ is not activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return subprocess.run([sys.executable, "-m", module, *arguments], env=os.environ | {"PATH": path}, check=False).returncode


def show(report: dict[str, Any]) -> None:
    """Print a report as a table, and the pick with its reasons."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # eight figures in 80 columns
    table.add_column("variant", no_wrap=True)
    for title, *_ in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    pick = report["pick"]
    for row in report["variants"]:
        ok, figures = row["status"] == "ok", row["metrics"] | row["speed"]
        remark = f"failed: {row['failure']}" if not ok else "pick" if row["variant"] == pick else \
            "Pareto" if row["pareto"] else ""
        table.add_row(escape(row["variant"]), *(_figure(figures, *column) for _, *column in COLUMNS), escape(remark),
                      style="red" if not ok else "bold green" if row["variant"] == pick else "")
    console = Console()
    console.print(table)
    console.print(f"\nShip for {escape(report['target']['name'])}: [bold]{escape(pick or 'none of them')}[/bold]")
    for reason in report["reasons"]:
        console.print(f"  - {escape(reason)}", highlight=False)


def _figure(figures: dict[str, float | None], key: str, scale: float, form: str) -> str:
    """A figure as text; "-" for one that was not measured."""
    value = figures.get(key)
    return "-" if value is None else format(value * scale, form)


if __name__ == "__main__":
    app()
