"""One variant's row of the report: its figures, or its named failure.

A row shows figures only of the bytes that are on disk: of another bundle, another runtime or other
answers it names the change in place of figures.
"""

from pathlib import Path
from typing import Any

from quantline.config.params import Params
from quantline.config.targets import Target
from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_json
from quantline.formats.bundle.manifest import MANIFEST, README, SMOKE, check_bundle
from quantline.formats.bundle.readme import SERVE
from quantline.metrics.figure import FIGURES, is_measured
from quantline.metrics.figures.experts import EXPERT_FIGURES
from quantline.metrics.figures.speed import ESTIMATED_SPEED
from quantline.metrics.results import ResultFiles, Results, read_lm_eval, read_results
from quantline.model.architecture import Architecture
from quantline.paths import EXPORTS, METRICS
from quantline.recipes.grid_counts import grid_counts
from quantline.report.budgets import budget_summary
from quantline.report.chain import REPRO, StaleLink, stale_links
from quantline.report.failures import last_failure, why_not_built
from quantline.report.gates import check_gate, does_not_apply
from quantline.report.layers import fallbacks, worst_layers
from quantline.report.speed_estimate import estimate_decoding
from quantline.report.variant import VariantRow
from quantline.run.lineage import make_again

NEEDED = ("mean_kld", "mean_kld_se", "size_bytes", "bits_per_weight")
NO_EXPERTS = "the model has none, or the recipe does not go by the calibration"
GOLD = ("gold_accuracy", "gold_accuracy_delta", "gold_flips", "gold_items", "gold_p_value")


def read_row(name: str, params: Params, arch: Architecture | None = None) -> VariantRow:
    """Read what is on disk of a variant.

    Args:
        name: Of the variant.
        params: Of the project.
        arch: Of the unquantized model; None leaves what is made from it unknown.

    Returns:
        The row, without what depends on the other rows.
    """
    variant = params.variants[name]
    row = VariantRow(name, variant.recipe, variant.format, variant.runtime)
    bundle = EXPORTS / name
    files = ResultFiles.of(METRICS, name)
    needed = (files.quality, files.speed, bundle / MANIFEST)
    if not all(path.is_file() for path in needed):
        row.status = "failed"
        row.failure, row.message = why_not_built(name, variant.recipe, params)
        return row
    try:
        manifest = check_bundle(bundle)
        results = read_results(files, manifest)
        links = stale_links(name, params)
        if links:
            row.status = "stale"
            row.failure = Failure.STALE
            row.message = _why_stale(name, variant.recipe, links, params)
            return row
        fill_in(row, bundle, manifest, results, params.target, arch)
        row.lm_eval = read_lm_eval(files, manifest)
    except StageError as error:
        return _failed(row, error.failure, str(error))
    except (AttributeError, KeyError, TypeError) as error:
        message = (
            f"expected the files of {bundle} and of its figures as their stages wrote them, found "
            f"{type(error).__name__} {error}; {make_again(f'{METRICS.name}/{name}')}"
        )
        return _failed(row, Failure.ARTIFACT_CHANGED, message)
    return row


def _failed(row: VariantRow, failure: Failure, message: str) -> VariantRow:
    """Return a row of the same variant without figures."""
    names = (row.variant, row.recipe, row.format, row.runtime)
    return VariantRow(*names, status="failed", failure=failure, message=message)


def _why_stale(name: str, recipe: str, links: list[StaleLink], params: Params) -> str:
    """Return why a variant's figures are not the present ones, and what to run."""
    message = f"its figures are older than the project: {links[0].reason}"
    stopped = last_failure(name, recipe, params)
    if stopped:
        message += f"; the last run stopped: {stopped[0]}: {stopped[1]}"
    return message if "run `" in message else f"{message}; {REPRO}"


def fill_in(
    row: VariantRow,
    bundle: Path,
    manifest: dict[str, Any],
    results: Results,
    target: Target,
    arch: Architecture | None,
) -> None:
    """Fill in what is known of a measured variant without the other variants.

    Args:
        row: Has the names alone.
        bundle: Folder of the bundle.
        manifest: Its manifest.
        results: What was measured on it.
        target: Whose gates are checked.
        arch: Of the unquantized model; None leaves what is made from it unknown.
    """
    _check_figures(results)
    row.metrics = results.quality
    row.speed = results.speed
    row.estimated = estimate_decoding(manifest["tensors"], row.runtime, target, arch)
    if row.estimated:
        row.provenance[ESTIMATED_SPEED] = "estimated"
    for gate in target.gates:
        # Without a gold set there is nothing that a gate on it could look at. A name that nobody
        # knows is not measured, and fails.
        on_gold_set = gate.metric in FIGURES and gate.metric.startswith("gold_")
        if gate.metric in EXPERT_FIGURES and manifest.get("experts", {}) is None:
            row.gates.append(does_not_apply(gate, NO_EXPERTS))
        elif "gold_accuracy" in row.metrics or not on_gold_set:
            row.gates.append(check_gate(gate, row.figures))
    row.flips = [item for item in results.answers if item["correct"] != item["baseline_correct"]]
    row.smoke = read_json(bundle / SMOKE)["prompts"]
    row.layers = worst_layers(manifest)
    row.fallbacks = fallbacks(manifest)
    row.grids = grid_counts(manifest["layers"])
    row.budget = budget_summary(manifest)
    row.lineage = read_lineage(bundle, manifest)
    row.substituted_share = manifest["substituted_share"]


def _check_figures(results: Results) -> None:
    """Check that there are the figures without which no variant is compared.

    Raises:
        KeyError: With the first that is no number.
    """
    keys = [*NEEDED, *(GOLD if "gold_accuracy" in results.quality else ())]
    for key in keys:
        if not is_measured(results.quality.get(key)):
            raise KeyError(key)


def read_lineage(bundle: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return where a bundle comes from.

    Returns:
        {source, recipe, calibration, versions, files, created_by} of its manifest, the source's
        files as one hash; and {serve}, the lines of its README that serve it.
    """
    readme = (bundle / README).read_text(encoding="utf-8")
    _, _, serve = readme.partition(SERVE)
    serve = serve.partition("\n## ")[0]
    source = {key: value for key, value in manifest["source"].items() if key != "files"}
    source["files_sha256"] = sha256_json(manifest["source"].get("files", {}))
    copied = ("recipe", "calibration", "versions", "files", "created_by")
    lineage = {key: manifest[key] for key in copied}
    return lineage | {"source": source, "serve": serve.strip()}
