"""What stopped a variant, from the run events."""

from quantline.config.params import Params
from quantline.errors import Failure, Reason
from quantline.paths import EVENTS
from quantline.run.events import read_events
from quantline.run.stage_names import run_name

NO_END = (
    "{summary}, and it never said how it ended: it was killed, or it still runs; run `quantline "
    "repro` again, which goes on from there"
)
NOT_BUILT = (Failure.MISSING_FILE, "it was not built; run `quantline repro`")


def why_not_built(name: str, recipe: str, params: Params) -> tuple[str, str]:
    """Return name and message of what stopped a variant, or of that it was not built."""
    stopped = last_failure(name, recipe, params)
    if stopped:
        return stopped
    failure, message = NOT_BUILT
    before = last_failure(name, recipe)
    if before:
        message = (
            "it was not built with the present parameters; run `quantline repro` (with others it "
            f"stopped: {before[0]}: {before[1]})"
        )
    return failure, message


def last_failure(name: str, recipe: str, params: Params | None = None) -> tuple[str, str] | None:
    """Return what went wrong on the way to a variant.

    Args:
        name: Of the variant.
        recipe: Of its recipe.
        params: The present ones: runs with others do not count, such as those of queued
            experiments. None counts all.

    Returns:
        Name and message of the newest error of a stage that has not ended well since, or of a
        stage that has started and not ended; None if there is neither.
    """
    stages = {
        ("load", None),
        ("answer", None),
        ("calibrate", None),
        ("reference", None),
        ("quantize", recipe),
        ("export", name),
        ("evaluate", name),
    }
    ids = {run_name(*stage, known) for stage in stages for known in (params, None)}
    failures: dict[tuple[str, str | None], tuple[str, str]] = {}  # the newest stands last
    for event in read_events(EVENTS):
        instance = event["payload"].get("instance")
        stage = (event["stage"], instance if isinstance(instance, str) else None)
        failed = event["severity"] in ("error", "critical")
        told = failed or event["reason_code"] in (Reason.STAGE_STARTED, Reason.STAGE_FINISHED)
        if stage not in stages or not told:
            continue
        # A run that could read no parameters counts too.
        if params is not None and "run_id" in event and str(event["run_id"]) not in ids:
            continue
        failures.pop(stage, None)
        if event["reason_code"] == Reason.STAGE_STARTED:
            failures[stage] = (Failure.KILLED, NO_END.format(summary=event["summary"]))
        if failed:
            failure = str(event["payload"].get("failure", Failure.INTERNAL_ERROR))
            failures[stage] = (failure, event["summary"])
    return list(failures.values())[-1] if failures else None
