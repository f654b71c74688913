"""The frame around every stage: parameters, run events, atomic outputs, MLflow, and failures with a name."""

import contextlib
import difflib
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantline.config.compose import StaleError, check_fresh, load_params
from quantline.config.params import Params
from quantline.config.section import ConfigError
from quantline import files as outputs
from quantline.paths import EVENTS
from quantline.tracking import mlflow_runs as experiments
from quantline.errors import REASON_OF_STAGE, Failure, Reason, StageError, failure_of
SEVERITIES = ("info", "warning", "error", "critical")
INSTANCES = {"quantize": "recipes", "export": "variants", "evaluate": "variants", "lm_eval": "variants"}  # stage -> section of its names
ADVICE = {Failure.OUT_OF_MEMORY: "; close other programs, or take fewer or shorter sequences",
          Failure.DISK_FULL: "; free some space (`dvc gc --workspace` drops old results), then run it again"}
UPSTREAM = {"calibrate": "load", "reference": "calibrate", "quantize": "calibrate", "export": "quantize",
            "evaluate": "export", "lm_eval": "export"}


def run_name(stage: str, instance: str | None, params: Params | None) -> str:
    """`<stage>-<hash>` of what the run is about: the same stage on the same parameters has the same id."""
    about = [stage, instance, params.model_dump(mode="json") if params else None]
    return f"{stage}-{outputs.sha256_json(about)[:12]}"


def _main_root() -> Path:
    """The main repository's root; the working folder where there is none (an error event must not fail)."""
    try:
        return experiments.main_root()
    except ConfigError:
        return Path.cwd()


class StageRun:
    """One run of one stage."""

    def __init__(self, stage: str, instance: str | None) -> None:
        self.stage, self.instance, self.started, self.began = stage, instance, time.perf_counter(), time.time()
        self.params: Params = None  # set by stage_run before the stage's own code runs
        self.run_id = run_name(stage, instance, None)
        self.finished: str | None = None

    @property
    def label(self) -> str:
        return f"{self.stage} {self.instance}" if self.instance else self.stage

    def load_params(self) -> None:
        """Read params.yaml, refuse a stale one, and cut the Hub off unless the parameters name it."""
        params = load_params()
        check_fresh(params)
        self._check_instance(params)
        self.params, self.run_id = params, run_name(self.stage, self.instance, params)
        sources = (params.model.source, params.calibration.source, params.evaluation.source)
        if self.stage != "lm_eval" and "hub" not in sources:  # whose tasks have their data on the Hub
            os.environ["HF_HUB_OFFLINE"] = "1"

    def _check_instance(self, params: Params) -> None:
        """Raise ConfigError unless the instance is one that params.yaml has (or none, for a stage without any)."""
        section = INSTANCES.get(self.stage)
        valid = sorted(getattr(params, section)) if section else []
        if self.instance in (valid if section else [None]):
            return
        near = difflib.get_close_matches(self.instance or "", valid, n=1)
        raise ConfigError(
            f"{self.stage} takes the name of one of {section} in params.yaml ({', '.join(valid)}), found "
            f"{self.instance or 'none'}{f' (did you mean {near[0]}?)' if near else ''}" if section else
            f"{self.stage} takes no name, found {self.instance}")

    def parent(self) -> str | None:
        """The run id of the stage that this one continues."""
        upstream = UPSTREAM.get(self.stage)
        if upstream is None or self.params is None:
            return None
        instance = self.instance
        if upstream == "quantize" and instance in self.params.variants:
            instance = self.params.variants[instance].recipe
        return run_name(upstream, instance if upstream in ("quantize", "export") else None, self.params)

    def event(self, severity: str, summary: str, reason: Reason | None = None,
              payload: dict[str, Any] | None = None, failure: Failure | None = None) -> None:
        """Append one line to events.jsonl, and inside a queued experiment's copy to the main repository's too.

        `severity` is info, warning, error or critical; the last two need a reason (ValueError without).
        """
        if severity not in SEVERITIES or (reason is None and severity in ("error", "critical")):
            raise ValueError(f"expected a severity among {', '.join(SEVERITIES)}, with a reason at error and critical; "
                             f"found {severity} and {reason}")
        payload = {"instance": self.instance, **({"failure": failure} if failure else {}), **(payload or {})}
        line = {
            "id": str(uuid.uuid4()), "ts": datetime.now(UTC).isoformat(), "run_id": self.run_id,
            "parent_run_id": self.parent(), "stage": self.stage, "severity": severity, "reason_code": reason,
            "actor": "quantline", "summary": summary, "payload": payload,
        }
        text = json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n"
        for place in sorted({EVENTS.resolve(), _main_root() / EVENTS}):
            with place.open("a", encoding="utf-8") as file:
                file.write(text)

    def output(self, target: str | Path) -> contextlib.AbstractContextManager[Path]:
        """An output folder that appears when its block ends well."""
        return outputs.atomic_folder(Path(target))

    def resumable_output(self, target: str | Path, key: dict[str, Any]) -> contextlib.AbstractContextManager[Path]:
        """An output folder that appears when its block ends well, and in which a killed run is continued if all that
        it depends on, `key`, is the same.
        """
        return outputs.resumable_folder(Path(target), key, self._resuming)

    def _resuming(self, what: str) -> None:
        print(f"{self.label}: {what}")
        self.event("info", f"{self.label} {what}", Reason.STAGE_STARTED)

    def output_file(self, target: str | Path, value: Any) -> None:
        """An output file of JSON, written beside and renamed."""
        outputs.write_json(Path(target), value)

    def track(self, key: str, name: str, params: dict | None = None, metrics: dict | None = None,
              tags: dict | None = None, files: list[Path] | None = None,
              datasets: Sequence[experiments.Dataset] = ()) -> str:
        """Log to MLflow, in the run whose key is `key`. Returns that run's id there."""
        tags = {"stage": self.stage, "model": self.params.model.id or self.params.model.path, "suite": self.params.suite,
                **(tags or {})}
        return experiments.record(self.params.tracking, key, name, params or {}, metrics or {}, tags, files or [], datasets,
                                  self.began)

    def finish(self, summary: str) -> None:
        """Say what the stage made; printed, with the seconds that it took, when the stage has ended well."""
        self.finished = summary

    def fail(self, failure: Failure, message: str, reason: Reason | None, **payload: Any) -> None:
        """Write the error event and say on stderr what happened."""
        reason = reason or REASON_OF_STAGE[self.stage]
        print(f"{self.label}: {reason} ({failure}): {message}", file=sys.stderr)
        try:
            self.event("error", message, reason, payload, failure)
        except OSError as error:  # a full disk cannot take the event either
            print(f"{self.label}: cannot write {EVENTS}: {error}", file=sys.stderr)


@contextlib.contextmanager
def stage_run(stage: str, instance: str | None = None) -> Iterator[StageRun]:
    """Run a stage: its failures become a named event, a plain message and exit code 1."""
    run = StageRun(stage, instance)
    try:
        run.load_params()
        run.event("info", f"{run.label} started", Reason.STAGE_STARTED)
        yield run
    except ConfigError as error:
        stale = isinstance(error, StaleError)
        run.fail(Failure.CONFIG_STALE if stale else Failure.CONFIG_INVALID, str(error), Reason.CONFIG_INVALID)
        raise SystemExit(1) from None
    except StageError as error:
        run.fail(error.failure, str(error), error.reason)
        raise SystemExit(1) from None
    except Exception as error:  # noqa: BLE001 whatever it is, it is told, and ends the stage
        failure = failure_of(error)
        if failure is Failure.INTERNAL_ERROR:
            traceback.print_exc()
        run.fail(failure, f"{type(error).__name__}: {error}{ADVICE.get(failure, '')}", None,
                 traceback=traceback.format_exc())
        raise SystemExit(1) from None
    seconds = time.perf_counter() - run.started
    summary = run.finished or "done"
    run.event("info", f"{run.label}: {summary}", Reason.STAGE_FINISHED, {"seconds": round(seconds, 3)})
    print(f"{run.label}: {summary}, {seconds:.1f} s")
