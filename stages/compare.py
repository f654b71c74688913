"""Hold all variants side by side and say which one to ship for the target.

    python -m stages.compare     # metrics/, artifacts/exports/ → reports/compression.{html,md,json}, reports/plots/

A variant that failed upstream stands in the report with its named failure.
"""

import json
from pathlib import Path

from stages.config import Params
from stages.evaluate import EXPORTS, METRICS, REFERENCE, check_bundle
from stages.load import MODEL
from stages.report import gates, memory, page, selection
from stages.tracking import (
    EVENTS,
    Failure,
    Reason,
    StageError,
    StageRun,
    sha256_json,
    stage_run,
    write_json,
    write_text,
)

REPORTS = Path("reports")
WORST_LAYERS = 8  # of a variant in the report; the manifest has all


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
    return {**{key: manifest[key] for key in ("recipe", "calibration", "versions", "files", "created_by")},
            "source": source, "serve": serve.strip()}


def worst_layers(manifest: dict) -> list[dict]:
    """The layers with the largest output error, first; none for a method that tells no errors."""
    told = [{"name": name, **about} for name, about in manifest["layers"].items() if "error" in about]
    return sorted(told, key=lambda layer: (-layer["error"], layer["name"]))[:WORST_LAYERS]


def row_of(name: str, params: Params) -> dict:
    """One variant's row of the report."""
    variant = params.variants[name]
    row = {"variant": name, "recipe": variant.recipe, "format": variant.format, "runtime": variant.runtime,
           "status": "ok", "failure": None, "message": None, "pareto": False, "metrics": {}, "speed": {}, "gates": [],
           "flips": [], "smoke": [], "layers": [], "lineage": {}, "memory": {"mib": None}, "substituted_share": 0.0,
           "provenance": {"quality": "measured", "speed": "measured"}}
    paths = (METRICS / f"{name}.json", METRICS / f"{name}.speed.json", EXPORTS / name / "manifest.json")
    if not all(path.is_file() for path in paths):
        failure, message = last_failure(name, variant.recipe)
        return row | {"status": "failed", "failure": failure, "message": message}
    try:
        check_bundle(EXPORTS / name)
    except StageError as error:
        return row | {"status": "failed", "failure": error.failure, "message": str(error)}
    metrics, speed, manifest = (read(path) for path in paths)
    if metrics["artifact_sha256"] != manifest["artifact_sha256"]:
        return row | {"status": "failed", "failure": Failure.ARTIFACT_CHANGED,
                      "message": "the metrics belong to other bytes than the bundle on disk; run dvc repro"}
    checked = [gates.check_gate(gate, metrics | speed) for gate in params.target.gates
             if "gold_accuracy" in metrics or not gate.metric.startswith("gold_")]
    items = read(METRICS / "items" / f"{name}.json")
    return row | {"metrics": metrics, "speed": speed, "gates": checked,
                  "substituted_share": manifest["substituted_share"],
                  "flips": [item for item in items if item["correct"] != item["baseline_correct"]],
                  "smoke": read(EXPORTS / name / "smoke.json")["prompts"], "layers": worst_layers(manifest),
                  "lineage": lineage(EXPORTS / name, manifest)}


def build(params: Params) -> dict:
    """The whole report, as reports/compression.json has it."""
    rows = [row_of(name, params) for name in params.variants]
    front = selection.on_front([row for row in rows if row["status"] == "ok"])
    facts = memory.facts_of(MODEL)
    for row in rows:
        row["pareto"] = row["variant"] in front
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
    }


def compare(run: StageRun) -> None:
    report = build(run.params)
    points = [{"variant": row["variant"], "format": row["format"], "size_mib": row["metrics"]["size_bytes"] / 2**20,
               "mean_kld": row["metrics"]["mean_kld"], "gold_accuracy": row["metrics"].get("gold_accuracy")}
              for row in report["variants"] if row["status"] == "ok"]
    write_json(REPORTS / "plots" / "pareto.json", points)
    write_json(REPORTS / "compression.json", report)
    write_text(REPORTS / "compression.md", page.markdown(report))
    write_text(REPORTS / "compression.html", page.html(report))
    failed = sum(row["status"] != "ok" for row in report["variants"])
    run.track(key=f"compare:{sha256_json(report)}", name="compare", files=[REPORTS / "compression.html"],
              params={"target": report["target"]["name"], "pick": report["pick"]},
              metrics={"variants": len(report["variants"]), "failed": failed})
    run.finish(f"{len(points)} variants measured, {failed} failed; for {report['target']['name']} ship "
               f"{report['pick'] or 'none of them'}; page: {REPORTS / 'compression.html'}")


if __name__ == "__main__":
    with stage_run("compare") as this:
        compare(this)
