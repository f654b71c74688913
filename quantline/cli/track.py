"""`quantline track`: what MLflow did not take when it was made."""

import os

import typer

from quantline.cli.program import PARAMS, app, run_module, stop
from quantline.config.compose import load_params, project_root
from quantline.errors import ConfigError
from quantline.messages import say

COMPARE = "compare"


@app.command()
def track() -> None:
    """Deliver the runs that MLflow did not take when they were made; exit code 1 if any is left."""
    from quantline.tracking.store import TrackingError
    from quantline.tracking.undelivered import deliver, kept

    try:
        os.chdir(project_root())
        tracking = load_params(PARAMS).tracking
        waiting = len(list(kept()))
        if not waiting:
            say("no run waits for MLflow")
            return
        delivery = deliver(tracking)
    except (ConfigError, TrackingError) as error:
        raise stop(error) from None
    say(f"{len(delivery.delivered)} of {waiting} runs delivered")
    if delivery.error is not None:
        raise stop(delivery.error)
    # The comparison registers the pick, which takes the runs.
    if any(run.tags.get("stage") == COMPARE for run in delivery.delivered):
        raise typer.Exit(run_module("stages.compare"))
