"""One tiny model's way through the stages, step by step; each end is written down with its cause.

It goes on where an earlier process stopped: a step that it began and did not end is what brought
that process down.
"""

import importlib
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models.architectures import Architecture
from benchmarks.models.forks import call_in_fork, forks_for_processes
from benchmarks.models.project import CHECKPOINT, VARIANTS
from benchmarks.models.whole_model import FILE, largest_difference, run_whole
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.messages import shortened
from quantline.paths import CALIBRATION, EVENTS, EXPORTS, METRICS, MODEL, QUANTIZED, REFERENCE
from quantline.run.events import read_events
from quantline.run.stage import stage_run

MAKE = "make"
OF_MODEL = ("check", "load", "calibrate", "reference", "answer")
WHOLE = "whole"
# Steps that compare what a full-precision bundle says with what the whole model says.
COMPARED = ("bf16", "onnx-fp32", "gguf-f32")


class Journey:
    """What has been found out about one architecture.

    Attributes:
        record: Its JSON: {name, made, steps: step → its end, figures: variant → figures}.
    """

    def __init__(self, name: str, architecture: Architecture, project: Path, record: Path) -> None:
        """Begin, or go on.

        Args:
            name: Of the architecture.
            architecture: What its checkpoint is made of.
            project: Folder of its project, without a model at first.
            record: File for what is found out.
        """
        self.name = name
        self.architecture = architecture
        self.project = project
        self.file = record
        self.record: dict[str, Any] = {"name": name, "steps": {}, "figures": {}}
        if record.is_file():
            self.record = read_json(record)
        self.steps: dict[str, Any] = self.record["steps"]

    def close_step_in_work(self, failure: Failure, message: str) -> None:
        """Say how a process ended while a step was in work."""
        for step in self.steps.values():
            if step.get("failure") == "in_work":
                step |= {"failure": failure, "message": message}
        write_json(self.file, self.record)

    def forget(self, variants: Iterable[str]) -> None:
        """Forget what an earlier project said of the model and of some variants."""
        again = {*variants, *(VARIANTS[variant] for variant in variants)}
        for label in list(self.steps):
            instance = label.partition(" ")[2]
            if not instance or instance in again:
                del self.steps[label]

    def run(self, variants: Iterable[str] = VARIANTS) -> None:
        """Take every step that has not been taken, as far as those before it allow.

        Args:
            variants: To export and evaluate.
        """
        import torch
        import transformers

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        os.chdir(self.project)
        with forks_for_processes():
            self._take(MAKE, self._make)
            for stage in OF_MODEL:
                self._take_stage(stage)
                if stage == "reference":
                    self._take(WHOLE, self._compare_reference, after=("reference",))
            for variant in variants:
                recipe = VARIANTS[variant]
                before = ("calibrate", *_before_rounding(variant, variants))
                self._take_stage("quantize", recipe, after=before)
                self._take_stage("export", variant, after=(f"quantize {recipe}", "answer"))
                self._take_stage("evaluate", variant, after=(f"export {variant}", "reference"))
                if variant in COMPARED:
                    done = (f"export {variant}", WHOLE)
                    self._take(f"compare {variant}", self._compare(variant), after=done)
        self.record["tried"] = sorted({*self.record.get("tried", ()), *variants})
        write_json(self.file, self.record)

    def _take_stage(
        self, stage: str, instance: str | None = None, after: tuple[str, ...] = ()
    ) -> None:
        """Run a stage, which names its failures itself."""
        label = f"{stage} {instance}" if instance else stage

        def run() -> None:
            module = importlib.import_module(f"stages.{stage}")
            try:
                with stage_run(stage, instance) as stage_frame:
                    getattr(module, stage)(stage_frame)
            except SystemExit:
                raise _failure_in_events() from None
            self._note_figures(stage, instance)

        self._take(label, run, after or self._before(stage))

    @staticmethod
    def _before(stage: str) -> tuple[str, ...]:
        order = (MAKE, *OF_MODEL)
        return (order[order.index(stage) - 1],)

    def _take(self, label: str, act: Callable[[], None], after: tuple[str, ...] = ()) -> None:
        """Take a step and write down how it ended, unless that is known."""
        if label in self.steps or not all(self._went_well(step) for step in after):
            return
        self.steps[label] = {"failure": "in_work"}
        write_json(self.file, self.record)
        started = _cpu_seconds()
        end: dict[str, Any] = {"failure": None}
        try:
            act()
        except StageError as error:
            end = {"failure": error.failure, "message": str(error)}
        except Exception as error:
            end = {"failure": "not_made", "message": f"{type(error).__name__}: {error}"}
        end["seconds"] = round(_cpu_seconds() - started, 2)
        self.steps[label] = end
        write_json(self.file, self.record)

    def _went_well(self, label: str) -> bool:
        return label in self.steps and self.steps[label]["failure"] is None

    def _make(self) -> None:
        """Make the checkpoint."""
        from benchmarks.models.tiny_checkpoint import write_checkpoint

        folder = Path(CHECKPOINT)
        shutil.rmtree(folder, ignore_errors=True)
        self.record["made"] = write_checkpoint(self.architecture, folder)._asdict()

    def _compare_reference(self) -> None:
        """Hold what the model says block by block against what it says as a whole."""
        from safetensors.numpy import load_file

        from quantline.model.output_head import open_head

        stored = load_file(REFERENCE / "hidden.safetensors")
        whole = run_whole(Path(CHECKPOINT), self.architecture.auto, stored["tokens"])
        np.savez(FILE, tokens=stored["tokens"], logprobs=whole)
        head = open_head(REFERENCE, read_json(REFERENCE / "reference.json"))
        hidden = stored["hidden"]
        found = head.logprobs(hidden.reshape(-1, hidden.shape[-1])).reshape(whole.shape)
        self.record["figures"][WHOLE] = {"difference": float(np.abs(found - whole).max())}

    def _compare(self, variant: str) -> Callable[[], None]:
        """Return a step that holds a bundle against the whole model."""

        def compare() -> None:
            manifest = read_json(EXPORTS / variant / "manifest.json")
            function = f"{largest_difference.__module__}:{largest_difference.__name__}"
            arguments = {
                "bundle": str(EXPORTS / variant),
                "runtime": manifest["runtime"],
                "whole": FILE,
            }
            found = call_in_fork(function, arguments, None, f"the comparison of {variant}")
            self.record["figures"].setdefault(variant, {}).update(found)

        return compare

    def _note_figures(self, stage: str, instance: str | None) -> None:
        """Keep what the matrix shows of a stage's results."""
        figures = self.record["figures"]
        if stage == "load":
            figures["load"] = {"parameters": read_json(MODEL / "manifest.json")["parameters"]}
        elif stage == "calibrate":
            layers = read_json(CALIBRATION / "calibration.json")["layers"]
            starved = sum(bool(layer.get("starved")) for layer in layers.values())
            figures["calibrate"] = {"layers": len(layers), "starved": starved}
        elif stage == "quantize" and instance == "awq-w4g32":
            report = read_json(QUANTIZED / instance / "quantized.json")
            folded = [step["of"] for step in report["transforms"] if step["step"] == "fold_scales"]
            scaled = sum(len(linears) for linears in folded) / len(report["layers"])
            figures[f"quantize {instance}"] = {"folded": len(folded), "scaled": scaled}
        elif stage == "export" and instance:
            manifest = read_json(EXPORTS / instance / "manifest.json")
            steps = [step["step"] for step in manifest["transforms"]]
            figures[instance] = {
                "bits_per_weight": manifest["bits_per_weight"],
                "rounded": _rounded_share(manifest["layers"]),
                "converted": "convert" in steps,
            }
        elif stage == "evaluate" and instance:
            measured = read_json(METRICS / f"{instance}.json")
            kept = {key: measured[key] for key in ("mean_kld", "max_kld", "same_top_p")}
            figures.setdefault(instance, {}).update(kept)


def _before_rounding(variant: str, variants: Iterable[str]) -> tuple[str, ...]:
    """Return the steps without which a variant need not be tried.

    The types of GGUF are all made from one conversion: where that fails, they fail alike.
    """
    rounded = variant.startswith("gguf-") and variant != "gguf-f32"
    return ("export gguf-f32",) if rounded and "gguf-f32" in variants else ()


def _rounded_share(layers: Iterable[str]) -> float:
    """Return the share of the blocks' weights that are in rounded layers."""
    from quantline.model.checkpoint import Checkpoint

    source = Checkpoint(MODEL)
    in_blocks = [name for name in source.names if source.arch.layer_index(name) is not None]
    sizes = {name: math.prod(source.shape(name)) for name in in_blocks}
    rounded = sum(sizes.get(f"{layer}.weight", 0) for layer in layers)
    return rounded / sum(sizes.values())


def _failure_in_events() -> StageError:
    """Return the failure that a stage has just written down."""
    with suppress(StopIteration):
        event = next(one for one in reversed(read_events(EVENTS)) if one["severity"] == "error")
        failure = event["payload"].get("failure", Failure.INTERNAL_ERROR)
        return StageError(Failure(failure), shortened(event["summary"]))
    return StageError(Failure.INTERNAL_ERROR, "the stage failed and wrote no event")


def _cpu_seconds() -> float:
    """Return what this process and those that it has waited for have computed for."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    forks = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + forks.ru_utime + forks.ru_stime
