"""Hold all variants side by side and say which one to ship for the target.

    python -m stages.compare     # metrics/, artifacts/exports/ → reports/compression.{html,md,json}, reports/plots/

A variant that failed upstream stands in the report with its named failure.
"""

import json
from pathlib import Path

from quantline.model.architecture import Architecture
from quantline.config.params import Params
from stages.evaluate import check_bundle
from quantline.report import (
    budgets,
    gates,
    layers,
    memory,
    page,
    plots,
    promotion,
    selection,
    speed_estimate as estimates,
)
from quantline.errors import Failure, Reason, StageError
from quantline.files import sha256_file, sha256_json, write_json, write_text
from quantline.run.stage import EVENTS, StageRun, stage_run
from quantline.tracking.mlflow_runs import evaluation_datasets, git_commit, without_secrets
from quantline.paths import EXPORTS, METRICS, MODEL, REFERENCE, REPORTS



def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def last_failure(name: str, recipe: str) -> tuple[str, str]:
    """(named failure, message) of the newest error on the way to this variant whose stage has not ended well since."""
    ours = {("quantize", recipe), ("export", name), ("evaluate", name), ("load", None), ("calibrate", None),
            ("reference", None)}
    open_errors: dict[tuple, tuple[str, str]] = {}
    for line in EVENTS.read_text(encoding="utf-8").splitlines() if EVENTS.is_file() else []:
        event = json.loads(line)
        stage = (event["stage"], event["payload"].get("instance"))
        if stage in ours and (event["reason_code"] == Reason.STAGE_FINISHED or event["severity"] in ("error", "critical")):
            open_errors.pop(stage, None)  # so that the newest stands last
            if event["severity"] in ("error", "critical"):
                open_errors[stage] = (event["payload"]["failure"], event["summary"])
    return [(Failure.MISSING_FILE, "it was not built; run dvc repro"), *open_errors.values()][-1]


def lineage(bundle: Path, manifest: dict) -> dict:
    """Where a bundle comes from: its source, recipe, calibration, versions and files, and the lines that serve it."""
    _, _, serve = (bundle / "README.md").read_text(encoding="utf-8").partition("## Serve it")
    source = {key: value for key, value in manifest["source"].items() if key != "files"}
    source["files_sha256"] = sha256_json(manifest["source"].get("files", {}))
    return {**{key: manifest[key] for key in ("recipe", "calibration", "versions", "files", "created_by")},
            "source": source, "serve": serve.strip()}


def harness_of(name: str, manifest: dict) -> dict:
    """What tasks of lm-evaluation-harness said of these bytes (see stages/lm_eval.py); of other bytes they say nothing."""
    path = METRICS / f"{name}.lm-eval.json"
    found = read(path) if path.is_file() else {}
    return found["tasks"] if found.get("artifact_sha256") == manifest["artifact_sha256"] else {}


def figures_of(name: str, manifest: dict) -> tuple[dict, dict, list[dict]]:
    """(metrics, speed, answers) of a variant. Raises StageError(artifact_changed) if one of them is not of the bundle's bytes in
    its runtime.
    """
    metrics, speed, items = METRICS / f"{name}.json", METRICS / f"{name}.speed.json", METRICS / "items" / f"{name}.json"
    quality, whose = read(metrics), {"artifact_sha256": manifest["artifact_sha256"], "runtime": manifest["runtime"]}
    changed = [path for path in (metrics, speed) if not whose.items() <= read(path).items()]
    if not items.is_file() or quality.get("items_sha256") != sha256_file(items):
        changed.append(items)
    if changed:
        raise StageError(Failure.ARTIFACT_CHANGED, f"{changed[0]} belongs to other bytes than the bundle on disk; run dvc repro")
    return quality, read(speed), read(items)


def row_of(name: str, params: Params, facts: Architecture | None = None) -> dict:
    """One variant's row of the report; `facts` of the model are what its estimated figures are made from."""
    variant = params.variants[name]
    row = {"variant": name, "recipe": variant.recipe, "format": variant.format, "runtime": variant.runtime,
           "status": "ok", "failure": None, "message": None, "pareto": False, "metrics": {}, "speed": {}, "gates": [], "lm_eval": {},
           "flips": [], "smoke": [], "layers": [], "budget": None, "beside": None, "lineage": {}, "memory": {"mib": None},
           "estimated": {},
           "substituted_share": 0.0,
           "provenance": {"quality": "measured", "speed": "measured"}}
    paths = (METRICS / f"{name}.json", METRICS / f"{name}.speed.json", EXPORTS / name / "manifest.json")
    if not all(path.is_file() for path in paths):
        failure, message = last_failure(name, variant.recipe)
        return row | {"status": "failed", "failure": failure, "message": message}
    try:
        manifest = check_bundle(EXPORTS / name)
        metrics, speed, items = figures_of(name, manifest)
    except StageError as error:
        return row | {"status": "failed", "failure": error.failure, "message": str(error)}
    estimated = estimates.decode(manifest["tensors"], variant.runtime, params.target, facts)
    figures = speed | metrics | {estimates.DECODE: estimated.get("decode_tok_s")}
    checked = [gates.check_gate(gate, figures) for gate in params.target.gates
             if "gold_accuracy" in metrics or not gate.metric.startswith("gold_")]
    if estimated:
        row["provenance"] = row["provenance"] | {estimates.DECODE: "estimated"}
    return row | {"metrics": metrics, "speed": speed, "gates": checked, "estimated": estimated,
                  "lm_eval": harness_of(name, manifest), "substituted_share": manifest["substituted_share"],
                  "flips": [item for item in items if item["correct"] != item["baseline_correct"]],
                  "smoke": read(EXPORTS / name / "smoke.json")["prompts"], "layers": layers.worst(manifest),
                  "lineage": lineage(EXPORTS / name, manifest), "budget": budgets.told(manifest)}


def published(params: Params) -> dict:
    """The parameters as anybody may see them: a database's address may hold a password."""
    values = params.model_dump(mode="json")
    return values | {"tracking": values["tracking"] | {"uri": without_secrets(params.tracking.uri)}}


def build(params: Params) -> dict:
    """The whole report, as reports/compression.json has it."""
    facts = memory.facts_of(MODEL)
    rows = [row_of(name, params, facts) for name in params.variants]
    front = selection.on_front([row for row in rows if row["status"] == "ok"])
    for row in rows:
        row["pareto"] = row["variant"] in front
        row["beside"] = budgets.beside(row, rows)
        if row["status"] == "ok":
            row["memory"] = memory.memory(row, params.target, facts)
            row["provenance"] |= {"memory": row["memory"]["provenance"]}
    rows.sort(key=lambda row: (row["status"] != "ok", row["metrics"].get("mean_kld", 0), row["variant"]))
    chosen, second, reasons = selection.pick(rows, params.target)
    model, reference = MODEL / "manifest.json", REFERENCE / "reference.json"
    loaded = read(model) if model.is_file() else {"parameters": 0}
    truth = read(reference) if reference.is_file() else {"tokens": 0, "gold_accuracy": {}}
    return {
        "model": params.model.id or params.model.path, "parameters": loaded["parameters"],
        "target": params.target.model_dump(mode="json"), "pick": chosen, "runner_up": second, "reasons": reasons,
        "tokens": truth["tokens"], "baseline": truth["gold_accuracy"],
        "tasks": [task for task in sorted(truth["gold_accuracy"]) if task != "all"], "variants": rows,
        "commit": git_commit(), "params": published(params),
    }


def compare(run: StageRun) -> None:
    report = build(run.params)
    points = plots.data([row for row in report["variants"] if row["status"] == "ok"])
    write_json(REPORTS / "plots" / "pareto.json", points)
    write_json(REPORTS / "compression.json", report)
    write_text(REPORTS / "compression.md", page.markdown(report))
    write_text(REPORTS / "compression.html", page.html(report))
    failed = sum(row["status"] != "ok" for row in report["variants"])
    reference = REFERENCE / "reference.json"
    datasets = evaluation_datasets(run.params.evaluation, read(reference)) if reference.is_file() else []
    run.track(key=f"compare:{sha256_json(report)}", name="compare", datasets=datasets,
              files=[REPORTS / f"compression.{kind}" for kind in ("html", "json", "md")],
              params={"target": report["target"], "pick": report["pick"]},
              metrics={"variants": len(report["variants"]), "failed": failed})
    promoted = promotion.promote(run, report, EXPORTS, promotion.log_variants(run, report, EXPORTS, datasets))
    run.finish(f"{len(points)} variants measured, {failed} failed; for {report['target']['name']} ship "
               f"{report['pick'] or 'none of them'}, {promoted}; page: {REPORTS / 'compression.html'}")


if __name__ == "__main__":
    with stage_run("compare") as this:
        compare(this)
