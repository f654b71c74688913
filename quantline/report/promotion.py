"""The comparison in MLflow: what it adds to each variant's run, and the pick as a version of a registered model."""

import json
from pathlib import Path

from quantline.config.params import Params
from quantline.report.speed_estimate import DECODE
from quantline.errors import Reason
from quantline.run.stage import StageRun
from quantline.tracking.mlflow_runs import Dataset, figures, git_commit, of_variant
from quantline.tracking.model_registry import SHA256, NoRegistry, in_queued_copy, register


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))


def log_variants(run: StageRun, report: dict, exports: Path, datasets: list[Dataset]) -> dict[str, str]:
    """Add figures, verdicts and data sets to the run of each measured variant, also where DVC took its figures from the
    cache and nothing was logged yet. Returns the MLflow run id of each.
    """
    target, ids = report["target"]["name"], {}
    for row in report["variants"]:
        if row["status"] != "ok":
            continue
        about = of_variant(manifest_of(exports / row["variant"]))
        found = figures(row["metrics"]) | {"speed": row["speed"], "memory_mib": row["memory"]["mib"],
                                           DECODE: row["estimated"].get("decode_tok_s")}
        verdict = "pick" if row["variant"] == report["pick"] else "meets" if not row["objections"] else "does not meet"
        tags = about["tags"] | {"stage": "evaluate", "pareto": str(row["pareto"]).lower(), f"target.{target}": verdict}
        ids[row["variant"]] = run.track(**about | {"tags": tags}, metrics=found, datasets=datasets)
    return ids


def obstacle(params: Params, report: dict) -> str | None:
    """Why the pick is not to be registered; None if it is. A required gate that was not checked has not passed."""
    if params.tracking.registry is None:
        return "tracking.registry is null"
    row = next((row for row in report["variants"] if row["variant"] == report["pick"]), None)
    if row is None:
        return f"no variant meets the target {params.target.name}; the alias stays where it is"
    for one in params.target.gates:
        asked = one.model_dump()
        passed = any(gate["passed"] and {key: gate[key] for key in asked} == asked for gate in row["gates"])
        if one.required and not passed:
            return f"the required gate {one.metric} {one.operator} {one.threshold:g} was not checked or does not pass"
    if in_queued_copy():
        return "this is a queued experiment; apply it, and run `python -m stages.compare`"
    return None


def promote(run: StageRun, report: dict, exports: Path, ids: dict[str, str]) -> str:
    """Register the pick, or write an event that says why not. Returns that in words."""
    why, registry = obstacle(run.params, report), run.params.tracking.registry
    if why is None:
        row = next(row for row in report["variants"] if row["variant"] == report["pick"])
        m = row["metrics"]
        gates = [f"{gate['metric']} {gate['operator']} {gate['threshold']:g} {gate['verdict']}"
                 for gate in row["gates"] if gate["required"]]
        tags = {key: row[key] for key in ("variant", "recipe", "format", "runtime")} | {
            SHA256: m[SHA256], "target": run.params.target.name, "git_commit": git_commit(),
            "gates": "; ".join(gates),
            **{key: f"{m[key]:.6g}" for key in ("mean_kld", "gold_accuracy", "size_bytes") if key in m}}
        description = "\n".join(f"- {reason}" for reason in report["reasons"]) + "\n\n" + row["lineage"]["serve"]
        try:
            bundle = exports / report["pick"]
            version, new = register(run.params.tracking, ids[report["pick"]], bundle, tags, description)
        except NoRegistry as error:
            why = f"the MLflow server keeps no models: {error}"
        else:
            told = f"{registry.name} version {version}, {registry.alias}"
            run.event("info", f"{report['pick']} is {told}{'' if new else ', as before'}", Reason.MODEL_REGISTERED,
                      {"variant": report["pick"], SHA256: m[SHA256], "name": registry.name, "version": version,
                       "alias": registry.alias, "new": new})
            return f"registered as {told}"
    run.event("warning" if registry else "info", f"no model is registered: {why}", Reason.MODEL_NOT_REGISTERED,
              {"variant": report["pick"]})
    return f"not registered: {why}"
