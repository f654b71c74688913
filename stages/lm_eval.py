"""Run tasks of lm-evaluation-harness on one bundle, in its runtime (the extra lm-eval).

python -m stages.lm_eval gguf-q4_k_m --tasks arc_easy,hellaswag --limit 100
                                        # → metrics/gguf-q4_k_m.lm-eval.json

Tasks and their data come from the Hub, unless they are one's own: `--include-path` names a folder
of YAML files. Such a file may call Python functions beside it (`!function`), so take it only from
where you would take code from.
"""

import sys
from typing import Any

from quantline.formats.bundle.manifest import check_bundle
from quantline.metrics.lm_eval_options import parse_arguments
from quantline.metrics.results import ResultFiles, task_values, write_lm_eval
from quantline.paths import EXPORTS, METRICS, MODEL
from quantline.run.child_process import call_in_child
from quantline.run.stage import StageRun, stage_run


def lm_eval(run: StageRun, options: dict[str, Any]) -> None:
    """Run the stage."""
    name = run.name
    runtime = run.params.variants[name].runtime
    evaluation = run.params.evaluation
    manifest = check_bundle(EXPORTS / name)
    tasks = options["tasks"]
    arguments = options | {
        "bundle": str(EXPORTS / name),
        "runtime": runtime,
        "model": str(MODEL),
        "tasks": tasks.split(","),
        "threads": evaluation.speed.threads,
        "seed": run.params.seed,
    }
    measured = call_in_child(
        "quantline.metrics.lm_eval_tasks:run_tasks",
        arguments,
        evaluation.limits,
        f"lm-evaluation-harness on {name}",
        evaluation.pythons.get(runtime),
    )
    files = ResultFiles.of(METRICS, name)
    write_lm_eval(files, manifest, runtime, measured)
    values = task_values(measured["tasks"])
    run.track(
        key=f"{name}:{manifest['artifact_sha256']}",
        name=name,
        metrics={f"lm_eval/{metric}": value for metric, value in values.items()},
        files=[files.lm_eval],
    )
    figures = ", ".join(f"{metric} {value:.4g}" for metric, value in values.items())
    run.set_summary(f"{tasks}: {figures}")


if __name__ == "__main__":
    command = vars(parse_arguments(sys.argv[1:]))
    with stage_run("lm_eval", command.pop("variant")) as run:
        lm_eval(run, command)
