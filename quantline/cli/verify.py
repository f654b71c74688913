"""`quantline verify`: whether bundles and figures are what was made and measured."""

import os
from pathlib import Path
from typing import Annotated

import typer

from quantline.cli.program import PARAMS, app, stop
from quantline.config.compose import load_params, project_root
from quantline.config.stale import check_fresh
from quantline.errors import ConfigError, StageError
from quantline.formats.bundle.manifest import MANIFEST
from quantline.messages import say


@app.command()
def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Variants of the project, or folders of bundles anywhere; without any, all "
            "variants",
            metavar="[VARIANT|BUNDLE]...",
            show_default=False,
        ),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="The figures that belong to a bundle's folder", show_default=False),
    ] = None,
) -> None:
    """Hash bundles, and check that the figures belong to the bytes; exit code 1 if not."""
    from quantline.report.verification import verify_bundle, verify_variant

    bundles = [Path(name) for name in names or [] if (Path(name) / MANIFEST).is_file()]
    variants = [name for name in names or [] if Path(name) not in bundles]
    if figures is not None and (len(bundles) != 1 or variants):
        # A variant's own are known; and one file of figures belongs to one bundle.
        raise stop(
            ConfigError(
                f"expected the folder of one bundle with --figures {figures}, found "
                f"{' '.join(names or []) or 'none'}; leave --figures out for a variant"
            )
        )
    failed = False
    for folder in bundles:
        try:
            say(verify_bundle(folder, figures))
        except StageError as error:
            say(f"{folder}: {error.failure}: {error}", error=True)
            failed = True
    if variants or not bundles:
        try:
            os.chdir(project_root())
            params = load_params(PARAMS)
            check_fresh(params)
            unknown = [name for name in variants if name not in params.variants]
            if unknown:
                raise ConfigError(
                    f"expected the folder of a bundle, or a variant among "
                    f"{', '.join(params.variants)}, found {unknown[0]}"
                )
        except ConfigError as error:
            raise stop(error) from None
        for name in variants or params.variants:
            try:
                say(verify_variant(name, params))
            except StageError as error:
                say(f"{name}: {error.failure}: {error}", error=True)
                failed = True
    raise typer.Exit(int(failed))
