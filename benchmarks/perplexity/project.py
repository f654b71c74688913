"""A project with the variants that are measured, and our reference for the tool's tokens.

python -m benchmarks.perplexity.project load calibrate quantize@none export@gguf-f32

runs stages of the project that is the working folder, one after another in one process.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from benchmarks.paths import ROOT
from benchmarks.peers.llama_perplexity import read_tokens
from benchmarks.perplexity.environment import process_environment
from quantline.config.compose import as_yaml, compose
from quantline.paths import MODEL
from quantline.run.stage import stage_run
from quantline.text.tokenizer import Tokenizer

BASE = "gguf-f32"  # the variant whose logits are the tool's reference
UNQUANTIZED = "none"  # its recipe


@dataclass(frozen=True)
class Reference:
    """Our reference for the tokens that the tool scores.

    Attributes:
        folder: What the stage `reference` would write.
        tokens: int32 [chunks, length].
        first: The first position of a chunk after which tokens count.
    """

    folder: Path
    tokens: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        """How many tokens count."""
        chunks, length = self.tokens.shape
        return chunks * (length - 1 - self.first)


def make_project(folder: Path, model: Path, variants: dict[str, str], threads: int) -> None:
    """Export the base and the variants of a model, by the pipeline's own stages.

    Args:
        folder: Of the project.
        model: The checkpoint.
        variants: Name → its recipe.
        threads: Of the process.

    Raises:
        SystemExit: If a stage fails.
    """
    recipes = [UNQUANTIZED, *variants.values()]
    names = [BASE, *variants]
    overrides = [
        "model=local",
        f"model.path={model.resolve()}",
        f"variant=[{','.join(names)}]",
        f"recipe=[{','.join(recipes)}]",
    ]
    for section in ("calibration", "evaluation"):
        text = (ROOT / "demo/data" / section).resolve()
        overrides.append(f"{section}.path={text}.txt")
    overrides += [
        "evaluation.gold=null",
        "calibration.sequences=16",
        "evaluation.speed.repetitions=1",
    ]
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "dvc.yaml", folder)
    params = as_yaml(compose(overrides, root=folder))
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    stages = ["load", "calibrate"]
    stages += [f"quantize@{recipe}" for recipe in recipes]
    stages += [f"export@{name}" for name in names]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.perplexity.project", *stages],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=process_environment(threads),
    )
    if process.returncode:
        raise SystemExit(f"making {', '.join(variants)} failed: {process.stderr[-2000:]}")


def run_stages(stages: list[str]) -> None:
    """Run stages of the project that is the working folder, one after another.

    Args:
        stages: Each is `name` or `name@instance`.
    """
    for stage in stages:
        name, _, instance = stage.partition("@")
        function = getattr(import_module(f"stages.{name}"), name)
        with stage_run(name, instance or None) as run:
            function(run)


def store_reference(project: Path, logits: Path, folder: Path) -> Reference:
    """Store our reference for the tokens in the tool's file.

    Args:
        project: Whose model it is of.
        logits: The tool's file.
        folder: It is made.

    Raises:
        SystemExit: If the tool has another vocabulary than the model.
    """
    from benchmarks.reference import write_hidden_reference
    from quantline.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(project / MODEL)
    arch = checkpoint.arch
    tokenizer = Tokenizer(checkpoint.folder)
    tokens, vocabulary = read_tokens(logits, tokenizer.bos)
    if vocabulary != arch.vocab_size:
        raise SystemExit(
            f"expected {arch.vocab_size} tokens in the tool's vocabulary, found {vocabulary}"
        )
    write_hidden_reference(checkpoint, tokens, folder)
    return Reference(folder, tokens, first=tokens.shape[1] // 2)


if __name__ == "__main__":
    run_stages(sys.argv[1:])
