"""What a run of a stage says of itself: run events, and runs in MLflow."""

import os
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.errors import Failure, Reason
from quantline.messages import redacted, say, shortened
from quantline.paths import EVENTS
from quantline.run.deliverer import has_deliverer
from quantline.run.events import append_event
from quantline.run.lineage import artifact_id, artifact_of
from quantline.run.stage_names import parent_name, run_name
from quantline.tracking.logged_models import BundleDescription
from quantline.tracking.mlflow_runs import FAILED
from quantline.tracking.run_content import Dataset
from quantline.tracking.store import events_root
from quantline.tracking.undelivered import Run, keep, log_failure, log_or_keep

EXPERIMENT = "DVC_EXP_NAME"  # in the environment of the stages of an experiment
ARTIFACT_ID = "quantline.artifact_id"  # a tag: the artifact that a stage made
LONGEST_TAG = 1000  # characters of a message in MLflow
SEVERITIES = ("info", "warning", "error", "critical")


def failed_key(run_id: str, failure: str) -> str:
    """Return the key of the run of a failed stage, whose id run events have."""
    return f"failed:{run_id}:{failure}"


class StageRecord:
    """Which run of which stage this is, and what is written down of it.

    Attributes:
        stage: The stage's name.
        instance: The recipe or variant, if the stage takes one.
        run_id: `<stage>-<hash>`, as run events have it.
    """

    def __init__(self, stage: str, instance: str | None) -> None:
        """Name the run; its parameters are not known yet."""
        self.stage = stage
        self.instance = instance
        self.run_id = run_name(stage, instance, None)
        self._started = time.time()
        self._params: Params | None = None
        self._warned = False

    @property
    def params(self) -> Params:
        """The content of params.yaml; `stage_run` has read it."""
        assert self._params is not None, "params.yaml was not read"
        return self._params

    @property
    def name(self) -> str:
        """The recipe or variant of a stage that takes one."""
        assert self.instance is not None, f"{self.stage} takes no name"
        return self.instance

    @property
    def label(self) -> str:
        """The stage with its recipe or variant."""
        return f"{self.stage} {self.instance}" if self.instance else self.stage

    def event(
        self,
        severity: str,
        summary: str,
        reason: Reason | None = None,
        payload: dict[str, Any] | None = None,
        failure: Failure | None = None,
    ) -> None:
        """Append a line to events.jsonl; in a queued experiment to the main repository's too.

        Args:
            severity: info, warning, error or critical.
            summary: A sentence.
            reason: Required at error and critical.
            payload: Details, as JSON.
            failure: The named cause.

        Raises:
            ValueError: For an unknown severity, or an error without a reason.
        """
        if severity not in SEVERITIES or (reason is None and severity in ("error", "critical")):
            raise ValueError(
                f"expected a severity among {', '.join(SEVERITIES)}, with a reason at error and "
                f"critical; found {severity} and {reason}"
            )
        details: dict[str, Any] = {"instance": self.instance}
        if experiment := os.environ.get(EXPERIMENT):
            details["experiment"] = experiment
        if failure:
            details["failure"] = failure
        event = {
            "id": str(uuid.uuid4()),
            "ts": datetime.now(UTC).isoformat(),
            "run_id": self.run_id,
            "parent_run_id": parent_name(self.stage, self.instance, self._params),
            "stage": self.stage,
            "severity": severity,
            "reason_code": reason,
            "actor": "quantline",
            "summary": summary,
            "payload": details | (payload or {}),
        }
        for path in sorted({EVENTS.resolve(), events_root() / EVENTS}):
            append_event(path, redacted(event))

    def warn(self, message: str) -> None:
        """Print a warning, and write it as an event."""
        self.event("warning", message)
        say(f"{self.label}: warning: {message}", error=True)

    def track(
        self,
        key: str,
        name: str,
        params: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        files: Sequence[Path] = (),
        datasets: Sequence[Dataset] = (),
        parent: str | None = None,
        model: BundleDescription | None = None,
        at_once: bool = False,
    ) -> str | None:
        """Log what the stage made to MLflow; if it takes nothing now, keep it for later and say so.

        It is kept too where another process logs it meanwhile (quantline/run/deliverer.py).

        Args:
            key: Names the content: what has the same key is logged to the same run.
            name: Shown by MLflow.
            params: Of a new run.
            metrics: Added to the run, nested ones by their path.
            tags: Added to the run, besides stage, model and suite.
            files: Logged as artifacts.
            datasets: What the figures were measured on.
            parent: Key of the run that this one is shown below.
            model: The bundle of a variant's run, which becomes a model of MLflow.
            at_once: Whether this process logs it, because it needs MLflow's id.

        Returns:
            MLflow's id of the run; None if it was kept for later.
        """
        run = Run(key, name, params or {}, metrics or {}, self._tags(tags or {}), files, datasets)
        run.started = self._started
        run.parent = parent
        run.model = model
        try:
            if not at_once and has_deliverer():
                keep(run)
                return None
            outcome = log_or_keep(self.params.tracking, run)
        except OSError as error:
            self._warn_of_tracking(f"and it cannot be kept for later: {error}", None)
            return None
        if outcome.error is not None:
            self._warn_of_tracking(
                f"{outcome.error}; it is kept, `quantline track` delivers it, and so does the next "
                "stage",
                outcome.error.failure,
            )
        return outcome.run_id

    def _tags(self, more: dict[str, str]) -> dict[str, str]:
        model = self.params.model
        tags = {
            "stage": self.stage,
            "model": model.id or model.path or "",
            "suite": self.params.suite,
        }
        # A comparison finds by this the runs of the stages that led to its figures.
        artifact = artifact_of(self.stage, self.instance)
        if artifact is not None and (made := artifact_id(artifact)):
            tags[ARTIFACT_ID] = made
        return tags | more

    def _warn_of_tracking(self, message: str, failure: Failure | None) -> None:
        """Say once that MLflow does not take the stage's runs."""
        if self._warned:
            return
        self._warned = True
        message = shortened(f"MLflow does not have what {self.label} made: {message}")
        say(f"{self.label}: {message}", error=True)
        self.event("warning", message, Reason.RUN_NOT_TRACKED, failure=failure)

    def track_failure(self, failure: Failure, reason: Reason, message: str) -> None:
        """Log a FAILED run with the failure's name, so far as parameters say where to."""
        if self._params is None:
            return
        tags = {
            "failure": str(failure),
            "reason_code": str(reason),
            "instance": self.instance or "",
            "message": shortened(message, LONGEST_TAG),
        }
        key = failed_key(self.run_id, failure)
        run = Run(key, self.label, tags=self._tags(tags), started=self._started, status=FAILED)
        try:
            if has_deliverer():
                keep(run)
            else:
                log_failure(self._params.tracking, run)
        except Exception as error:  # the failure itself has been said, and this is no other one
            say(f"{self.label}: MLflow does not have the failed run: {error}", error=True)
