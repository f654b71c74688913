"""`quantline compose`: from conf/ to params.yaml."""

import os
from pathlib import Path

from quantline.cli.program import PARAMS, Overrides, app, stop
from quantline.config.changes import summary
from quantline.config.compose import (
    as_yaml,
    compose,
    load_params,
    missing_inputs,
    present_params,
    project_root,
)
from quantline.config.unasked_changes import check_run
from quantline.config.validation import validate
from quantline.config.watched import broken_links
from quantline.errors import ConfigError
from quantline.files import write_text
from quantline.messages import say
from quantline.metrics.target_metrics import check_metrics
from quantline.run.model_elsewhere import is_model_elsewhere
from quantline.run.project_lock import project_lock


@app.command("compose")
def compose_command(overrides: Overrides = None) -> None:
    """Compose conf/ into params.yaml and say what changes."""
    try:
        os.chdir(project_root())
        with project_lock("quantline compose"):
            compose_project(overrides or [])
    except ConfigError as error:
        raise stop(error) from None


def compose_project(overrides: list[str], keeps_project: bool = False) -> None:
    """Write params.yaml into the working folder, the project's root.

    Args:
        overrides: Hydra's.
        keeps_project: Whether model and texts stay those of params.yaml unless an override or an
            edit of conf/ changes them.

    Raises:
        ConfigError: If conf/ does not compose, or the project would not be kept; params.yaml is
            then left as it was.
    """
    composed = compose(overrides)
    params = validate(composed)
    if keeps_project:
        check_run(present_params(), composed, overrides)
    check_metrics(params)
    missing = [*missing_inputs(params), *broken_links(params)]
    if is_model_elsewhere(params, Path.cwd()):
        missing = [line for line in missing if not line.startswith("model.")]
    if missing:
        raise ConfigError("\n".join(missing))
    try:
        changes = summary(load_params(PARAMS), params)
    except ConfigError:  # there is none yet, or an older version wrote it
        changes = ["params.yaml: new"]
    text = as_yaml(composed)
    if not PARAMS.is_file() or PARAMS.read_bytes() != text.encode():
        write_text(PARAMS, text)
    for change in changes:
        say(change)
    say(
        f"params.yaml: suite {params.suite}, {len(params.recipes)} recipes, "
        f"{len(params.variants)} variants, {'changed' if changes else 'as before'}"
    )
