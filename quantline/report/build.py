"""The whole report: every variant beside the others, and the one to ship for the target."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from quantline.calibration.store import INFO
from quantline.config.model_name import shown_name
from quantline.config.params import Params
from quantline.config.targets import Target
from quantline.errors import StageError
from quantline.files import read_json
from quantline.messages import redacted
from quantline.model.architecture import Architecture
from quantline.model.dequantized import said_of
from quantline.model.origin import read_origin
from quantline.paths import ANSWERS, CALIBRATION, MODEL, REFERENCE
from quantline.report.budgets import uniform_counterpart
from quantline.report.experts import experts_shown
from quantline.report.memory import memory_use, read_architecture
from quantline.report.pareto import variants_on_front
from quantline.report.registered import registered_versions
from quantline.report.rows import read_row
from quantline.report.selection import Choice, choose
from quantline.report.variant import VariantRow
from quantline.tracking.run_origin import git_commit, uncommitted_files

Value = TypeVar("Value")
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass
class Report:
    """The content of reports/compression.json, whose keys the fields are.

    Attributes:
        model: Id or path of the unquantized model.
        parameters: How many it has; 0 if it is not loaded.
        target: The target, as params.yaml has it.
        pick: The variant to ship; None if no variant meets the target.
        runner_up: The second best; None if there is none.
        reasons: The decision in sentences.
        tokens: Of the evaluation text.
        baseline: The unquantized model's accuracy on the gold set, by task and under "all".
        tasks: Tasks of the gold set.
        variants: All variants, those with figures first and the closest to the model before others.
        commit: That is checked out; "unknown" outside git.
        uncommitted: Files of conf/ or of the code that this commit has otherwise, or not at all.
        params: params.yaml without secrets.
        refused: What DVC refused in the run that made the report; the figures are older then.
        dequantized: A sentence on the reference, if the source is quantized; else empty.
        name: What the model is called.
        full_bytes: Bytes of its weights in the float type that they came in; 0 if not known.
        answers: What the unquantized model says to each prompt of the smoke test.
        registered: Variant → the version of a registered model that its bytes are.
        experts: How many tokens of the calibration text came to each expert of a mixture, by
            module, as calibration.json has it; empty if no variant here is rounded by it.
    """

    model: str
    parameters: int
    target: dict[str, Any]
    pick: str | None
    runner_up: str | None
    reasons: list[str]
    tokens: int
    baseline: dict[str, float]
    tasks: list[str]
    variants: list[VariantRow]
    commit: str
    uncommitted: list[str]
    params: dict[str, Any]
    refused: list[str]
    dequantized: str = ""
    experts: list[dict[str, Any]] = field(default_factory=list)
    name: str = ""
    full_bytes: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)
    registered: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def measured(self) -> list[VariantRow]:
        """The variants that have figures."""
        return [row for row in self.variants if row.is_measured]

    @property
    def measured_on(self) -> str:
        """The day of the newest measurement, as 2026-11-30; "" if it is not known."""
        return max((row.speed.get("measured_on") or "" for row in self.measured), default="")

    @property
    def picked(self) -> VariantRow | None:
        """The row of the variant to ship."""
        return next((row for row in self.variants if row.variant == self.pick), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as reports/compression.json has it."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"variants": [row.to_json() for row in self.variants]}


def collect_report(params: Params, refused: Sequence[str] = ()) -> Report:
    """Read what is measured in the project of the working folder, and choose for its target.

    Args:
        params: Of the project.
        refused: What DVC refused before, in sentences.
    """
    # Of a file that is torn, its lineage says so in each row.
    try:
        # A colleague without the model has its description from the remote.
        arch = read_architecture(MODEL) or read_architecture(REFERENCE)
    except StageError:
        arch = None
    rows = [read_row(name, params, arch) for name in params.variants]
    choice = rank(rows, params.target, arch)
    parameters = _known(MODEL / "manifest.json", "parameters", 0)
    steps: list[Any] = _known(MODEL / "manifest.json", "transforms", [])
    reference = REFERENCE / "reference.json"
    answers: list[dict[str, Any]] = _known(ANSWERS / "answers.json", "prompts", [])
    accuracy: dict[str, float] = _known(reference, "gold_accuracy", {})
    return Report(
        model=shown_name(params.model),
        parameters=parameters,
        target=params.target.model_dump(mode="json"),
        pick=choice.pick,
        runner_up=choice.runner_up,
        reasons=choice.reasons,
        tokens=_known(reference, "tokens", 0),
        baseline=accuracy,
        tasks=[task for task in sorted(accuracy) if task != "all"],
        variants=rows,
        commit=git_commit(),
        uncommitted=uncommitted_files(),
        params=_published(params),
        refused=list(refused),
        dequantized=said_of(steps),
        experts=experts_shown(rows, _known(CALIBRATION / INFO, "experts", [])),
        name=read_origin(MODEL).name if parameters else "",
        full_bytes=parameters * FLOAT_BYTES.get(_known(MODEL / "manifest.json", "dtype", ""), 0),
        answers=[{key: answer.get(key, "") for key in ("prompt", "output")} for answer in answers],
        registered=registered_versions(rows),
    )


def _known(path: Path, key: str, default: Value) -> Value:
    """Return a value of an artifact's file; the default if the file is not there, or torn."""
    try:
        value = read_json(path).get(key)
    except StageError:
        return default
    return value if isinstance(value, type(default)) else default


def rank(rows: list[VariantRow], target: Target, arch: Architecture | None) -> Choice:
    """Sort variants, fill in what each is beside the others, and choose one.

    Args:
        rows: All variants; those with figures come first then, the closest to the model before
            the others.
        target: Of the deployment.
        arch: Of the unquantized model; None leaves the size of its cache unknown.
    """
    front = variants_on_front([row for row in rows if row.is_measured])
    for row in rows:
        row.pareto = row.variant in front
        row.beside = uniform_counterpart(row, rows)
        if row.is_measured:
            row.memory = memory_use(row, target, arch)
            row.provenance["memory"] = row.memory["provenance"]
    rows.sort(key=lambda row: (not row.is_measured, row.metrics.get("mean_kld", 0), row.variant))
    return choose(rows, target)


def build_report(params: Params) -> dict[str, Any]:
    """Return `collect_report` as reports/compression.json has it."""
    return collect_report(params).to_json()


def _published(params: Params) -> dict[str, Any]:
    """Return the parameters as anybody may see them."""
    published: dict[str, Any] = redacted(params.model_dump(mode="json"))
    return published
