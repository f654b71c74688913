"""Tasks of lm-evaluation-harness on one bundle, from its files on disk, in its runtime (the extra lm-eval).

    python -m stages.lm_eval gguf-q4_k_m --tasks arc_easy,hellaswag --limit 100     # → metrics/gguf-q4_k_m.lm-eval.json

Tasks and their data come from the Hub, unless they are one's own: `--include-path` names a folder of YAML files. Such a
file may call Python functions beside it (`!function`), so take it only from where you would take code from.
"""

import argparse
import json
import logging
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantline.model.checkpoint import read_json
from quantline.text.tokenizer import Tokenizer
from quantline.config.compose import load_params
from quantline.config.params import Params
from stages.evaluate import check_bundle
from quantline.errors import Failure, Reason, StageError
from quantline.files import write_json
from quantline.run.stage import StageRun, stage_run
from quantline.run.child_process import answer, ask
from quantline.paths import EXPORTS, METRICS, MODEL

INSTALL = "install it: pip install 'quantline[lm-eval]'"
CONTEXT = ("max_position_embeddings", "n_positions")  # in config.json


def arguments(given: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m stages.lm_eval", description=__doc__.split("\n")[0])
    parser.add_argument("variant")
    parser.add_argument("--tasks", required=True, help="names of tasks or groups, parted by commas")
    parser.add_argument("--include-path", help="a folder of one's own tasks")
    parser.add_argument("--fewshot", type=int, help="examples before each question (default: as the task says)")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--chat", action="store_true", help="put the questions through the model's chat template")
    parser.add_argument("--max-length", type=int, help="tokens that the model looks at (default: as it says)")
    parser.add_argument("--into", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def context_length(model: Path) -> int:
    """Tokens that the model can look at. Raises StageError(missing_file) if its configuration does not say."""
    config = read_json(model / "config.json")
    found = next((config[key] for key in CONTEXT if key in config), None)
    if found is None:
        raise StageError(Failure.MISSING_FILE, f"expected one of {', '.join(CONTEXT)} in {model / 'config.json'}, found "
                                               "none; give --max-length")
    return found


def measure(asked: argparse.Namespace, params: Params) -> dict[str, Any]:
    """In the measuring process: {runtime_version, lm_eval_version, tasks}, where `tasks` has what `told` gives.

    Raises StageError: runtime_unavailable, dataset_invalid, and what answering raises.
    """
    if find_spec("lm_eval") is None:
        raise StageError(Failure.RUNTIME_UNAVAILABLE, f"expected lm-evaluation-harness, found none; {INSTALL}")
    logging.disable(logging.WARNING)
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from quantline.metrics.lm_eval_model import Answers
    from quantline.runtimes.runtime import open_runtime

    class Bundle(Answers, LM):
        """What the harness takes for a model."""

        def __init__(self, *given) -> None:
            LM.__init__(self)
            Answers.__init__(self, *given)

    variant = params.variants[asked.variant]
    manager, names = TaskManager(include_path=asked.include_path), asked.tasks.split(",")
    if strange := [name for name in names if name not in manager.all_tasks]:
        raise StageError(Failure.DATASET_INVALID, f"expected tasks of lm-evaluation-harness, found {', '.join(strange)}; "
                         "`lm-eval ls tasks` lists them, and --include-path adds one's own", Reason.EVAL_DATASET_MISSING)
    runtime = open_runtime(variant.runtime, EXPORTS / asked.variant, params.evaluation.speed.threads)
    model = Bundle(runtime, Tokenizer(MODEL), asked.max_length or context_length(MODEL))
    seed = params.seed
    try:
        results = lm_eval.simple_evaluate(
            model, tasks=names, task_manager=manager, num_fewshot=asked.fewshot, limit=asked.limit,
            apply_chat_template=asked.chat, log_samples=False, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed)
    except (OSError, ValueError, KeyError) as error:  # of `datasets`, and of a task whose file is wrong
        raise StageError(
            Failure.DATASET_INVALID, f"expected the tasks {asked.tasks} and their data, and lm-evaluation-harness cannot take "
            f"them: {type(error).__name__}: {error}; look at the task's file, and whether its data is there or the Hub "
            "answers", Reason.EVAL_DATASET_MISSING) from error
    return {"runtime_version": runtime.version, "lm_eval_version": lm_eval.__version__, "tasks": told(results, asked)}


def told(results: dict[str, Any], asked: argparse.Namespace) -> dict[str, dict]:
    """Per task and group: {metrics: {"acc,none": {value, stderr, higher_is_better}}, version, fewshot, documents, limit,
    chat}.

    Raises StageError(non_finite) for a metric that is NaN or infinite.
    """
    found = {}
    for name, values in sorted(results["results"].items()):
        metrics = {}
        for key, value in sorted(values.items()):
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, str | bool):
                continue
            if not math.isfinite(value):
                raise StageError(Failure.NON_FINITE, f"expected a finite {metric} of {name}, found {value}")
            spread = values.get(f"{metric}_stderr,{kind}")
            known = isinstance(spread, int | float) and math.isfinite(spread)  # "N/A" where there is none
            metrics[key] = {"value": float(value), "stderr": float(spread) if known else None,
                            "higher_is_better": results["higher_is_better"].get(name, {}).get(metric)}
        found[name] = {
            "metrics": metrics, "version": results["versions"].get(name), "fewshot": results["n-shot"].get(name),
            "documents": results["n-samples"].get(name, {}).get("effective"), "limit": asked.limit, "chat": asked.chat}
    return found


def lm_eval(run: StageRun, given: list[str]) -> None:
    """Measure, and put the tasks beside those that were measured before on the same bytes."""
    asked, name = arguments(given), run.instance
    manifest, variant = check_bundle(EXPORTS / name), run.params.variants[name]
    found = ask("stages.lm_eval", *given, limits=run.params.evaluation.limits, what=f"lm-evaluation-harness on {name}",
                python=run.params.evaluation.pythons.get(variant.runtime))
    about = {"artifact_sha256": manifest["artifact_sha256"], "runtime": variant.runtime}
    path = METRICS / f"{name}.lm-eval.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = before.get("artifact_sha256") == manifest["artifact_sha256"]
    write_json(path, {**about, **found, "tasks": (before["tasks"] if same else {}) | found["tasks"]})
    figures = [(task, metric, one["value"]) for task, told in found["tasks"].items() for metric, one in told["metrics"].items()]
    run.track(key=f"{name}:{manifest['artifact_sha256']}", name=name, files=[path],
              metrics={f"lm_eval/{task}/{metric.replace(',', '/')}": value for task, metric, value in figures})
    run.finish(f"{asked.tasks}: " + ", ".join(f"{task} {metric} {value:.4g}" for task, metric, value in figures))


if __name__ == "__main__":
    command = arguments(sys.argv[1:])
    if command.into:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        answer(Path(command.into), lambda: measure(command, load_params()))
    else:
        with stage_run("lm_eval", command.variant) as this:
            lm_eval(this, sys.argv[1:])
