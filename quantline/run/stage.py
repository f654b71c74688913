"""The frame around every stage: parameters, inputs, atomic outputs, and named failures."""

import contextlib
import difflib
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quantline.causes import advice_on, failure_of
from quantline.config.compose import load_params
from quantline.config.params import Params
from quantline.config.stale import check_fresh
from quantline.errors import REASON_OF_STAGE, ConfigError, Failure, Reason, StageError
from quantline.folders import atomic_folder, resumable_folder
from quantline.messages import say, shortened
from quantline.paths import EVENTS
from quantline.run.peak_memory import peak_of_processes_mib
from quantline.run.progress import at_work
from quantline.run.project_lock import project_lock
from quantline.run.result_folders import check_result_folders
from quantline.run.signals import AGAIN, Terminated, ends_on_request
from quantline.run.stage_inputs import READS, StageInputs
from quantline.run.stage_names import INSTANCES, run_name
from quantline.run.stage_record import StageRecord
from quantline.run.watchdog import watched

LOCK_WAIT_S = 10  # a composition ends within seconds


class StageRun(StageRecord):
    """One run of one stage.

    Attributes:
        stage: The stage's name.
        instance: The recipe or variant, if the stage takes one.
        run_id: `<stage>-<hash>`, as run events have it.
    """

    def __init__(self, stage: str, instance: str | None) -> None:
        """Start the clock."""
        super().__init__(stage, instance)
        self._timer = time.perf_counter()
        self._inputs: StageInputs | None = None
        self._summary = "done"

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads, as it was when it started."""
        assert self._inputs is not None, f"{self.stage} makes no artifact"
        return self._inputs

    def load_params(self) -> None:
        """Read params.yaml, if it is fresh; set HF_HUB_OFFLINE=1 unless a source is the Hub.

        Raises:
            ConfigError: If params.yaml is invalid or stale, the stage takes another name, or a
                folder of results leads out of the project.
            StageError: artifact_changed, if an artifact is not what its stage wrote.
        """
        params = load_params()
        check_fresh(params)
        check_result_folders()
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
        message = f"{type(error).__name__}: {error}{advice_on(error)}"
        self.fail(failure, message, traceback=traceback.format_exc())

    def succeed(self) -> None:
        """Write the last event and print the summary."""
        seconds = time.perf_counter() - self._timer
        peak = peak_of_processes_mib()
        payload = {"seconds": round(seconds, 3), "peak_mib": round(peak)}
        self.event("info", f"{self.label}: {self._summary}", Reason.STAGE_FINISHED, payload)
        say(f"{self.label}: {self._summary}, {seconds:.1f} s, peak memory {peak:,.0f} MiB")


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
                with watched(run.params.limits, run.fail_with) as watchdog, at_work(run.label):
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
