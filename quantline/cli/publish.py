"""`quantline publish`: bundles that verify and pass their gates, on the Hub with their figures."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from quantline.cli.program import PARAMS, app, stop
from quantline.config.compose import load_params, project_root
from quantline.config.params import Params
from quantline.config.stale import check_fresh
from quantline.errors import ConfigError, Failure, StageError
from quantline.files import MIB
from quantline.messages import say
from quantline.run.project_lock import project_lock


@app.command()
def publish(
    variants: Annotated[
        list[str], typer.Argument(help="Variants that are measured", show_default=False)
    ],
    to: Annotated[str, typer.Option(help="The repository, as owner/name")],
    base_model: Annotated[
        str | None,
        typer.Option(
            help="The model's owner/name on the Hub, where it was not loaded from there",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="If the repository is made: as a private one")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder and the card, and upload nothing")
    ] = False,
) -> None:
    """Publish bundles on the Hugging Face Hub, each with a model card that has its figures.

    A bundle that does not verify, or fails a required gate of the target, is refused:
    quantline publish gguf-q4_k_m --to me/my-model-gguf --dry-run
    """
    try:
        os.chdir(project_root())
        with project_lock("quantline publish"):
            _publish(variants, to, base_model, private, dry_run)
    except (ConfigError, StageError) as error:
        raise stop(error) from None


def _publish(
    variants: list[str], to: str, base_model: str | None, private: bool, dry_run: bool
) -> None:
    """Publish variants of the project of the working folder; arguments are those of `publish`."""
    from quantline.publish.hub import check_repository, upload
    from quantline.publish.staging import stage
    from quantline.report.build import collect_report

    params = load_params(PARAMS)
    check_fresh(params)
    check_repository(to)
    if base_model is not None:
        check_repository(base_model)
    names = list(dict.fromkeys(variants))
    check_variants(names, params)
    report = collect_report(params)
    rows = [next(row for row in report.variants if row.variant == name) for name in names]
    for row in rows:
        failing = [gate["said"] for gate in row.gates if gate["required"] and not gate["passed"]]
        if failing:
            raise StageError(
                Failure.PUBLICATION_REFUSED,
                f"expected {row.variant} to pass the required gates of the target "
                f"{params.target.name}, found that {'; '.join(failing)}; publish another variant, "
                "or change the target",
            )
    folder = stage(rows, report, params, to, base_model)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        say(f"{path.stat().st_size / MIB:10.2f} MiB  {path.relative_to(folder)}")
    if dry_run:
        say(f"not uploaded: what {to} would get lies in {folder}; read {_cards(files)}")
        return
    place = upload(folder, to, f"Publish {', '.join(names)}", private)
    say(f"published: {place}")
    shutil.rmtree(folder)


def check_variants(names: list[str], params: Params) -> None:
    """Check that variants are those of the project, and that their bundles and figures verify.

    Raises:
        ConfigError: For a name that is none.
        StageError: As `verify_variant` does.
    """
    from quantline.report.verification import verify_variant

    for name in names:
        if name not in params.variants:
            known = ", ".join(params.variants)
            raise ConfigError(f"expected variants among {known}, found {name}")
    for name in names:
        say(verify_variant(name, params))


def _cards(files: list[Path]) -> str:
    """Return the cards among files, in words."""
    return ", ".join(str(path) for path in files if path.name == "README.md")
