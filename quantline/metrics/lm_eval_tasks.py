"""Tasks of lm-evaluation-harness on one bundle: the library call of the stage `lm_eval`.

Arguments and result are plain JSON, so that a fresh process can make the call. It needs the extra
lm-eval, and imports it when it is called.
"""

import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, Reason, StageError
from quantline.files import read_json
from quantline.metrics.figure import is_measured
from quantline.metrics.lm_eval_model import RuntimeLM
from quantline.runtimes.runtime import open_runtime
from quantline.text.tokenizer import Tokenizer

INSTALL = "install it: pip install 'quantline[lm-eval]'"
CONTEXT_KEYS = ("max_position_embeddings", "n_positions")  # in config.json


def run_tasks(
    *,
    bundle: str,
    runtime: str,
    model: str,
    tasks: list[str],
    include_path: str | None,
    fewshot: int | None,
    limit: int | None,
    chat: bool,
    max_length: int | None,
    threads: int | None,
    seed: int,
) -> dict[str, Any]:
    """Run tasks on a bundle in its runtime.

    Args:
        bundle: Folder of the bundle.
        runtime: Name of the runtime.
        model: Folder of the unquantized model, whose tokenizer is used.
        tasks: Names of tasks or groups.
        include_path: A folder of YAML files with more tasks. They may call Python functions beside
            them (`!function`).
        fewshot: Examples before each question; None is as the task says.
        limit: Documents of each task; None is all.
        chat: Whether the questions go through the model's chat template.
        max_length: Context length in tokens; None is as the model's configuration says.
        threads: Threads of the runtime; None is one per core.
        seed: Of everything that the harness draws.

    Returns:
        {runtime_version, lm_eval_version, tasks: what `task_metrics` returns}.

    Raises:
        StageError: runtime_unavailable, if the harness is not installed; dataset_invalid, if a task
            or its data is not there; and what answering raises.
    """
    if find_spec("lm_eval") is None:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE, f"expected lm-evaluation-harness, found none; {INSTALL}"
        )
    logging.disable(logging.WARNING)
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class HarnessLM(RuntimeLM, LM):
        """What the harness accepts as a model."""

        def __init__(self, *arguments: Any) -> None:
            LM.__init__(self)
            RuntimeLM.__init__(self, *arguments)

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected tasks of lm-evaluation-harness, found {', '.join(unknown)}; "
            "`lm-eval ls tasks` lists them, and --include-path adds one's own",
            Reason.EVAL_DATASET_MISSING,
        )
    engine = open_runtime(runtime, Path(bundle), threads)
    length = max_length or context_length(Path(model))
    wrapped = HarnessLM(engine, Tokenizer(Path(model)), length)
    try:
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=fewshot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (OSError, ValueError, KeyError) as error:  # of `datasets`, and of a task's wrong file
        raise_if_of_machine(error)
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected the tasks {','.join(tasks)} and their data, and lm-evaluation-harness "
            f"cannot take them: {type(error).__name__}: {error}; look at the task's file, and "
            "whether its data is there or the Hub answers",
            Reason.EVAL_DATASET_MISSING,
        ) from error
    return {
        "runtime_version": engine.version,
        "lm_eval_version": lm_eval.__version__,
        "tasks": task_metrics(results, limit, chat),
    }


def context_length(model: Path) -> int:
    """Return how many tokens the model can look at.

    Raises:
        StageError: missing_file, if its configuration does not say.
    """
    config = read_json(model / "config.json")
    for key in CONTEXT_KEYS:
        if key in config:
            return config[key]
    raise StageError(
        Failure.MISSING_FILE,
        f"expected one of {', '.join(CONTEXT_KEYS)} in {model / 'config.json'}, found none; give "
        "--max-length",
    )


def task_metrics(
    results: dict[str, Any], limit: int | None, chat: bool
) -> dict[str, dict[str, Any]]:
    """Return what metrics/<variant>.lm-eval.json keeps of the harness's results.

    Args:
        results: Of lm_eval.simple_evaluate.
        limit: Documents of each task that were asked for.
        chat: Whether the chat template was used.

    Returns:
        Task or group → {metrics: {"acc,none": {value, stderr, higher_is_better}}, version, fewshot,
        documents, limit, chat}.

    Raises:
        StageError: non_finite, for a metric that is NaN or infinite.
    """
    tasks = {}
    for name, values in sorted(results["results"].items()):
        directions = results["higher_is_better"].get(name, {})
        tasks[name] = {
            "metrics": _metrics_of(name, values, directions),
            "version": results["versions"].get(name),
            "fewshot": results["n-shot"].get(name),
            "documents": results["n-samples"].get(name, {}).get("effective"),
            "limit": limit,
            "chat": chat,
        }
    return tasks


def _metrics_of(
    task: str, values: dict[str, Any], directions: dict[str, bool]
) -> dict[str, dict[str, Any]]:
    """Return the metrics among a task's values, whose keys are "metric,filter"."""
    metrics = {}
    for key, value in sorted(values.items()):
        metric, _, filter_name = key.partition(",")
        is_metric = filter_name and not metric.endswith("_stderr")
        if not is_metric or isinstance(value, str | bool):
            continue
        if not math.isfinite(value):
            raise StageError(
                Failure.NON_FINITE,
                f"expected a finite {metric} of {task}, found {value}; look at the recipe of this "
                "variant",
            )
        error = values.get(f"{metric}_stderr,{filter_name}")
        stderr = None
        if is_measured(error) and math.isfinite(error):  # the harness has "N/A" where there is none
            stderr = float(error)
        metrics[key] = {
            "value": float(value),
            "stderr": stderr,
            "higher_is_better": directions.get(metric),
        }
    return metrics
