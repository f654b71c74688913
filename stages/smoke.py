"""Try a bundle in the runtime that will serve it; `export` does this before it finishes.

python -m stages.smoke gguf-q4_k_m     # artifacts/exports/gguf-q4_k_m/, as it lies on disk
"""

import sys
from pathlib import Path
from typing import Any

from quantline.formats.bundle.manifest import check_bundle
from quantline.formats.container import load_container
from quantline.paths import ANSWERS, EXPORTS, MODEL
from quantline.run.child_process import call_in_child
from quantline.run.stage import StageRun, stage_run
from quantline.runtimes.smoke.answers import read_answers


def try_bundle(run: StageRun, folder: Path, rows: int) -> dict[str, Any]:
    """Try the bundle of a variant in a process of its own; return the content of smoke.json.

    `rows` is the height of the model's embedding.
    """
    variant = run.params.variants[run.name]
    evaluation = run.params.evaluation
    arguments = {
        "bundle": str(folder),
        "model": str(MODEL),
        "runtime": variant.runtime,
        "format": variant.format,
        "answers": read_answers(ANSWERS),
        "tokens": evaluation.smoke_tokens,
        "exact": run.params.recipes[variant.recipe].storage == "none",
        "threads": evaluation.speed.threads,
        "exact_tokenizer": variant.tokenizer == "exact",
        "rows": rows,
    }
    return call_in_child(
        "quantline.runtimes.smoke.smoke_test:smoke_test",
        arguments,
        evaluation.limits,
        f"the smoke test of {run.name}",
        evaluation.pythons.get(variant.runtime),
    )


def smoke(run: StageRun) -> None:
    """Run the stage."""
    folder = EXPORTS / run.name
    manifest = check_bundle(folder)
    source = load_container(manifest["format"]).open_source(MODEL)
    trace = try_bundle(run, folder, source.shape(source.arch.embedding)[0])
    answers = [f"{prompt['prompt']!r} → {prompt['output']!r}" for prompt in trace["prompts"]]
    run.set_summary("; ".join(answers))


if __name__ == "__main__":
    with stage_run("smoke", sys.argv[1]) as run:
        smoke(run)
