"""The frame around every stage: parameters, run events, atomic outputs, MLflow, named failures."""

import contextlib
import difflib
import os
import signal
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantline.config.compose import load_params
from quantline.config.params import Params
from quantline.config.stale import check_fresh
from quantline.errors import (
    ADVICE,
    REASON_OF_STAGE,
    ConfigError,
    Failure,
    Reason,
    StageError,
    failure_of,
)
from quantline.folders import atomic_folder, resumable_folder
from quantline.messages import redacted, say, shortened
from quantline.paths import EVENTS
from quantline.run.events import append_event
from quantline.run.project_lock import project_lock
from quantline.run.signals import AGAIN, Terminated, ends_on_request
from quantline.run.stage_inputs import READS, StageInputs
from quantline.run.stage_names import INSTANCES, parent_name, run_name
from quantline.run.watchdog import watched
from quantline.tracking.mlflow_runs import FAILED, Dataset
from quantline.tracking.store import events_root
from quantline.tracking.undelivered import Run, log_failure, log_or_keep

LOCK_WAIT_S = 10  # a composition ends within seconds
LONGEST_TAG = 1000  # characters of a message in MLflow
SEVERITIES = ("info", "warning", "error", "critical")


class StageRun:
    """One run of one stage.

    Attributes:
        stage: The stage's name.
        instance: The recipe or variant, if the stage takes one.
        run_id: `<stage>-<hash>`, as run events have it.
    """

    def __init__(self, stage: str, instance: str | None) -> None:
        """Start the clock."""
        self.stage = stage
        self.instance = instance
        self.run_id = run_name(stage, instance, None)
        self._timer = time.perf_counter()
        self._started = time.time()
        self._params: Params | None = None
        self._inputs: StageInputs | None = None
        self._summary = "done"
        self._warned = False

    @property
    def params(self) -> Params:
        """The content of params.yaml; `stage_run` has read it."""
        assert self._params is not None, "params.yaml was not read"
        return self._params

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads, as it was when it started."""
        assert self._inputs is not None, f"{self.stage} makes no artifact"
        return self._inputs

    @property
    def name(self) -> str:
        """The recipe or variant of a stage that takes one."""
        assert self.instance is not None, f"{self.stage} takes no name"
        return self.instance

    @property
    def label(self) -> str:
        """The stage with its recipe or variant."""
        return f"{self.stage} {self.instance}" if self.instance else self.stage

    def load_params(self) -> None:
        """Read params.yaml, if it is fresh; set HF_HUB_OFFLINE=1 unless a source is the Hub.

        Raises:
            ConfigError: If params.yaml is invalid or stale, or the stage takes another name.
            StageError: artifact_changed, if an artifact is not what its stage wrote.
        """
        params = load_params()
        check_fresh(params)
        self._check_instance(params)
        self._params = params
        self.run_id = run_name(self.stage, self.instance, params)
        sources = (params.model.source, params.calibration.source, params.evaluation.source)
        if self.stage != "lm_eval" and "hub" not in sources:  # whose tasks have data on the Hub
            os.environ["HF_HUB_OFFLINE"] = "1"
        if self.stage in READS:
            self._inputs = StageInputs(self.stage, self.instance, params)

    def _check_instance(self, params: Params) -> None:
        section = INSTANCES.get(self.stage)
        if section is None:
            if self.instance is not None:
                raise ConfigError(f"{self.stage} takes no name, found {self.instance}")
            return
        valid = sorted(getattr(params, section))
        if self.instance in valid:
            return
        near = difflib.get_close_matches(self.instance or "", valid, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(
            f"{self.stage} takes the name of one of {section} in params.yaml "
            f"({', '.join(valid)}), found {self.instance or 'none'}{hint}"
        )

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

    def output(self, target: str | Path) -> AbstractContextManager[Path]:
        """Return an output folder that appears when its block ends well."""
        return atomic_folder(Path(target))

    def resumable_output(
        self, target: str | Path, key: dict[str, Any]
    ) -> AbstractContextManager[Path]:
        """Return an output folder in which a killed run is continued.

        It is continued if all that the content depends on, `key`, is the same.
        """
        return resumable_folder(Path(target), key, self._announce)

    def _announce(self, sentence: str) -> None:
        say(f"{self.label}: {sentence}")
        self.event("info", f"{self.label} {sentence}", Reason.STAGE_STARTED)

    def track(
        self,
        key: str,
        name: str,
        params: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        tags: dict[str, str] | None = None,
        files: Sequence[Path] = (),
        datasets: Sequence[Dataset] = (),
    ) -> str | None:
        """Log what the stage made to MLflow; if it takes nothing now, keep it for later and say so.

        Args:
            key: Names the content: what has the same key is logged to the same run.
            name: Shown by MLflow.
            params: Of a new run.
            metrics: Added to the run, nested ones by their path.
            tags: Added to the run, besides stage, model and suite.
            files: Logged as artifacts.
            datasets: What the figures were measured on.

        Returns:
            MLflow's id of the run; None if it was kept for later.
        """
        run = Run(key, name, params or {}, metrics or {}, self._tags(tags or {}), files, datasets)
        run.started = self._started
        try:
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
        key = f"failed:{self.run_id}:{failure}"
        run = Run(key, self.label, tags=self._tags(tags), started=self._started, status=FAILED)
        try:
            log_failure(self._params.tracking, run)
        except Exception as error:  # the failure itself has been said, and this is no other one
            say(f"{self.label}: MLflow does not have the failed run: {error}", error=True)

    def set_summary(self, summary: str) -> None:
        """Set the summary that is printed when the stage ends."""
        self._summary = summary

    def fail(
        self, failure: Failure, message: str, reason: Reason | None = None, **payload: Any
    ) -> None:
        """Write the error event, print what happened to stderr, and log a FAILED run.

        Args:
            failure: The named cause.
            message: What was expected, what was found, and what to do next.
            reason: By default the stage's own (REASON_OF_STAGE).
            **payload: Details for the event, as JSON.
        """
        reason = reason or REASON_OF_STAGE[self.stage]
        message = shortened(message)
        say(f"{self.label}: {reason} ({failure}): {message}", error=True)
        try:
            self.event("error", message, reason, payload, failure)
        except OSError as error:  # a full disk cannot take the event either
            say(f"{self.label}: cannot write {EVENTS}: {error}", error=True)
        self.track_failure(failure, reason, message)

    def fail_with(self, error: StageError) -> None:
        """Write the error event of a named failure, and print it."""
        self.fail(error.failure, str(error), error.reason)

    def fail_unforeseen(self, error: BaseException) -> None:
        """Name what no stage foresaw; what is no error, such as a test's own, is raised again."""
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            if not isinstance(error, Exception | SystemExit):
                raise error
            say(traceback.format_exc(), error=True)
        advice = f"; {ADVICE[failure]}" if failure in ADVICE else ""
        message = f"{type(error).__name__}: {error}{advice}"
        self.fail(failure, message, traceback=traceback.format_exc())

    def succeed(self) -> None:
        """Write the last event and print the summary."""
        seconds = time.perf_counter() - self._timer
        payload = {"seconds": round(seconds, 3)}
        self.event("info", f"{self.label}: {self._summary}", Reason.STAGE_FINISHED, payload)
        say(f"{self.label}: {self._summary}, {seconds:.1f} s")


@contextlib.contextmanager
def stage_run(stage: str, instance: str | None = None) -> Iterator[StageRun]:
    """Run a stage: its failures become a named event, a plain message and exit code 1.

    A stage that is asked to end says so too; its exit code is then that of the signal.
    """
    run = StageRun(stage, instance)
    watchdog = None
    with ends_on_request():
        try:
            with project_lock(run.label, LOCK_WAIT_S):
                run.load_params()
                run.event("info", f"{run.label} started", Reason.STAGE_STARTED)
                with watched(run.params.limits, run.fail_with) as watchdog:
                    yield run
                run.succeed()
        except ConfigError as error:
            run.fail(error.failure, str(error), Reason.CONFIG_INVALID)
            raise SystemExit(1) from None
        except StageError as error:
            run.fail_with(error)
            raise SystemExit(1) from None
        except Terminated as error:
            if watchdog is not None and watchdog.breach is not None:
                run.fail_with(watchdog.breach)
                raise SystemExit(1) from None
            run.fail(Failure.INTERRUPTED, f"{run.label} was asked to end ({error}); {AGAIN}")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            run.fail(Failure.INTERRUPTED, f"{run.label} was stopped by Ctrl-C; {AGAIN}")
            raise SystemExit(128 + signal.SIGINT) from None
        except BaseException as error:  # whatever it is, it is named, and it ends the stage
            run.fail_unforeseen(error)
            raise SystemExit(1) from None
