"""The card of a published bundle: its README with what was measured on it."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from quantline.config.params import Params
from quantline.files import read_json
from quantline.formats.bundle.manifest import MANIFEST
from quantline.formats.bundle.readme import SERVE, bundle_readme, card_text, describe, terms
from quantline.messages import in_markdown
from quantline.metrics.figure import Section, columns_of, figure_of, is_measured
from quantline.model.gguf_files import SUFFIX, model_file
from quantline.model.origin import origin_of
from quantline.paths import EXPORTS, REFERENCE
from quantline.report.build import Report
from quantline.report.markdown import variants_table
from quantline.report.tables import describe_machines, figure_cells
from quantline.report.variant import VariantRow

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"
OF_SEVERAL = re.compile(r"-\d{5}-of-\d{5}$")  # ends the name of a split file
FROM_THE_HUB = """
Straight from the Hub:

```
llama-server -hf {repository}:{tag}
ollama run hf.co/{repository}:{tag}
```
"""
# Figure → the Hub's id of its metric, of those that go into a card's model-index.
ON_TEXT = {
    "perplexity": "perplexity",
    "mean_kld": "kl_divergence",
    "same_top_p": "same_top_token",
}
ON_GOLD = {"gold_accuracy": "accuracy"}


def card_of_one(
    row: VariantRow,
    report: Report,
    params: Params,
    repository: str,
    base_model: str | None = None,
) -> str:
    """Return the card of one bundle.

    Args:
        row: Of the variant, with figures.
        report: With all variants.
        params: Of the project.
        repository: The owner/name that it goes to.
        base_model: The model's id on the Hub, where the source is no model of the Hub.
    """
    manifest = read_json(EXPORTS / row.variant / MANIFEST)
    evaluation = evaluation_section(row, report) + _table_section(report)
    results = list(results_of(row, params))
    serve = f"{SERVE}\n\n{row.lineage['serve']}\n"
    if row.format == "gguf":
        # Programs know a file by the name of its types, the last part of the file's own.
        stem = model_file(list(manifest["files"])).removesuffix(SUFFIX)
        tag = OF_SEVERAL.sub("", stem).rpartition("-")[2]
        serve += FROM_THE_HUB.format(repository=repository, tag=tag)
    return bundle_readme(manifest, serve, evaluation, results, base_model)


def card_of_several(
    rows: Sequence[VariantRow], report: Report, params: Params, base_model: str | None = None
) -> str:
    """Return the card of a repository that has a folder for each of several bundles.

    Its model-index has the figures of the first, for an index tells no folders apart.
    """
    manifests = [read_json(EXPORTS / row.variant / MANIFEST) for row in rows]
    first = manifests[0]
    origin = origin_of(first)
    lines = [f"# {in_markdown(origin.name)}, {len(rows)} variants", ""]
    for row, manifest in zip(rows, manifests, strict=True):
        what = describe(manifest, base_model)
        lines.append(f"* [{row.variant}]({row.variant}/README.md): {what}")
    lines.append(
        "\nEach folder is complete; its README says how to serve it and how it was made.\n"
    )
    body = "\n".join(lines) + "\n" + evaluation_section(rows[0], report) + _table_section(report)
    body += f"## Terms\n\n{terms(origin)}\n"
    return card_text(first, body, list(results_of(rows[0], params)), base_model)


def evaluation_section(row: VariantRow, report: Report) -> str:
    """Return a table of a variant's figures with their errors, and what they were measured on."""
    truth = _truth()
    lines = [
        "## Evaluation",
        "",
        f"Of {row.variant}, measured on the files in this folder, in {row.runtime} "
        f"{row.metrics.get('runtime_version', '')}. Divergence is from full precision over "
        f"{report.tokens} tokens; ± is one standard error.",
        "",
        "| figure | value | |",
        "|---|---:|---:|",
    ]
    sections: tuple[Section, ...] = ("quality", "tail", "speed")
    for section in sections:
        cells = figure_cells(section, row.figures)
        for column, cell in zip(columns_of(section), cells, strict=True):
            if is_measured(cell.value):
                name = in_markdown(column.figure.label)
                lines.append(f"| {name} ({column.heading}) | {cell.text} | {cell.detail} |")
    lines.append("")
    for gate in row.gates:
        required = "required" if gate["required"] else "optional"
        lines.append(f"* gate ({required}), {gate['verdict']}: {in_markdown(gate['said'])}")
    for key, what in (("text_sha256", "evaluation text"), ("gold_sha256", "gold set")):
        if truth.get(key):
            lines.append(f"* sha256 of the {what}: {truth[key]}")
    lines += [f"* {in_markdown(line)}" for line in describe_machines([row])]
    commit = f"commit {report.commit}"
    if report.uncommitted:
        commit += f", with {len(report.uncommitted)} files changed and not committed"
    lines.append(f"* measured by quantline, {commit}, seed {report.params.get('seed')}")
    return "\n".join(lines) + "\n\n"


def _table_section(report: Report) -> str:
    """Return the table of all variants that were measured together."""
    return (
        f"## All variants\n\nOf {in_markdown(report.model)}, measured alike.\n\n"
        + "\n".join(variants_table(report))
        + "\n\n"
    )


def results_of(row: VariantRow, params: Params) -> "Iterator[EvalResult]":
    """Yield what was measured on a variant as the Hub's model-index has it."""
    from huggingface_hub import EvalResult

    evaluation = params.evaluation
    text = evaluation.dataset or str(evaluation.path).rpartition("/")[2]
    for key, metric in ON_TEXT.items():
        if is_measured(row.metrics.get(key)):
            yield EvalResult(
                task_type=TASK,
                dataset_type=evaluation.dataset or "text",
                dataset_name=text,
                dataset_config=evaluation.dataset_config,
                dataset_split=evaluation.split,
                dataset_revision=evaluation.dataset_revision,
                metric_type=metric,
                metric_name=_named(row.metrics, key),
                metric_value=row.metrics[key],
            )
    for key, metric in ON_GOLD.items():
        if is_measured(row.metrics.get(key)):
            yield EvalResult(
                task_type=TASK,
                dataset_type="gold-set",
                dataset_name=f"gold set of {row.metrics['gold_items']} questions",
                metric_type=metric,
                metric_name=_named(row.metrics, key),
                metric_value=row.metrics[key],
            )
    for task, found in row.lm_eval.items():
        for name, result in found["metrics"].items():
            yield EvalResult(
                task_type=TASK,
                dataset_type=task,
                dataset_name=task,
                metric_type=name.partition(",")[0],
                metric_name=name,
                metric_value=result["value"],
            )


def _named(metrics: dict[str, Any], key: str) -> str:
    """Return a figure's name with its standard error, which an index has no place for."""
    error = metrics.get(f"{key}_se")
    label = figure_of(key).label
    return f"{label} (± {error:.2g})" if is_measured(error) else label


def _truth() -> dict[str, Any]:
    """Return what was measured on; nothing where the reference is not on this machine."""
    path = REFERENCE / "reference.json"
    return read_json(path) if path.is_file() else {}
