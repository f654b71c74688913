"""The real `dvc repro` on a tiny model: from a checkpoint to the page, with a variant that fails, mended by a setting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("quantline", "stages", "conf", "hydra_plugins", "dvc.yaml", "pyproject.toml", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore")
VARIANTS = ("bf16", "gguf-q8_0", "gptq-w4g128", "onnx-int4-gptq")


class Clone:
    """A clone of the project, as a user has it; its commands run with the Python of the tests."""

    def __init__(self, root: Path, overrides: list[str]) -> None:
        self.root, self.overrides = root, overrides
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, root / name)
        for command in (["git", "init", "--quiet"], ["git", "add", "--all"], ["git", "commit", "--quiet", "-m", "start"]):
            self.run(*command)

    def run(self, *command: str, expect: int = 0) -> str:
        """What the command says. It has to end with the code `expect`."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        identity = {f"GIT_{who}_{what}": "nobody@nowhere" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False,
                              env=os.environ | identity | {"PATH": path, "PYTHONPATH": str(self.root), "COLUMNS": "200"})
        assert done.returncode == expect, f"{command} ended with {done.returncode}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def quantline(self, command: str, *more: str, expect: int = 0) -> str:
        return self.run(sys.executable, "-m", "quantline.cli", command, *self.overrides, *more, expect=expect)

    def dvc(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def report(self) -> dict[str, dict]:
        """The rows of the report by variant."""
        rows = json.loads((self.root / "reports/compression.json").read_text())["variants"]
        return {row["variant"]: row for row in rows}

    def finished(self) -> list[tuple[str, str | None]]:
        """(stage, instance) of every stage that has ended well so far."""
        lines = map(json.loads, (self.root / "events.jsonl").read_text().splitlines())
        return [(line["stage"], line["payload"]["instance"]) for line in lines if line["reason_code"] == "stage_finished"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, make_model, texts, empty_database) -> Clone:
    """A clone with a model whose feed-forward width, 320, groups of 128 do not divide."""
    root = tmp_path_factory.mktemp("clone")
    model = make_model(tmp_path_factory.mktemp("odd") / "model", intermediate_size=320, num_hidden_layers=1)
    shutil.copy(empty_database, root / "mlflow.db")
    return Clone(root, [
        "recipe=[none,q8_0,gptq-w4g128]", f"variant=[{','.join(VARIANTS)}]", "model=local", f"model.path={model}",
        "calibration=file", f"calibration.path={texts / 'calibration.txt'}", "calibration.part=[0.0,1.0]",
        "calibration.sequences=8", "calibration.length=64", "evaluation=file",
        f"evaluation.path={texts / 'evaluation.txt'}", "evaluation.part=[0.0,1.0]", "evaluation.sequences=4",
        "evaluation.length=64", f"evaluation.gold={texts / 'gold.jsonl'}", "evaluation.smoke_tokens=4",
        "evaluation.speed={prompt_tokens: 8, new_tokens: 4, repetitions: 1, threads: 1}"])


def test_from_a_checkpoint_to_the_page(clone):
    # A recipe that does not fit the model fails by name; the others go on, and the page shows both.
    said = clone.quantline("repro", expect=1)
    assert "export_quantization_failed (unsupported_width)" in said and "group_size can be 64, 32" in said
    rows = clone.report()
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"bf16", "gguf-q8_0"}
    assert {row["failure"] for row in rows.values()} == {None, "unsupported_width"}
    assert "unsupported_width" in (clone.root / "reports/compression.html").read_text()
    assert not (clone.root / "artifacts/quantized/gptq-w4g128").exists()

    # The setting that the message names mends it, and nothing else runs again.
    before = clone.finished()
    clone.overrides.append("recipes.gptq-w4g128.group_size=32")
    clone.quantline("repro")
    rows = clone.report()
    assert set(rows) == set(VARIANTS) and {row["status"] for row in rows.values()} == {"ok"}
    assert sorted(clone.finished()[len(before):], key=str) == [("compare", None), *(
        (stage, name) for stage in ("evaluate", "export") for name in ("gptq-w4g128", "onnx-int4-gptq")),
        ("quantize", "gptq-w4g128")]
    figures = {name: row["metrics"] for name, row in rows.items()}
    assert abs(figures["bf16"]["mean_kld"]) < 1e-4 < figures["gptq-w4g128"]["mean_kld"]
    assert figures["gguf-q8_0"]["mean_kld"] < figures["gptq-w4g128"]["mean_kld"]
    assert figures["onnx-int4-gptq"]["mean_kld"] == pytest.approx(figures["gptq-w4g128"]["mean_kld"], rel=0.05)

    # Nothing changed: nothing runs.
    before = clone.finished()
    assert "Data and pipelines are up to date." in clone.dvc("repro")
    assert clone.finished() == before

    # A sweep over a recipe reruns that recipe's stages alone. DVC composes anew: the choices are given again.
    clone.run("git", "add", "--all")
    clone.run("git", "commit", "--quiet", "-m", "baseline")
    settings = [word for override in [*clone.overrides, "recipes.gptq-w4g128.bits=3"] for word in ("-S", override)]
    clone.dvc("exp", "run", "--name", "three-bits", *settings)
    ran = clone.finished()[len(before):]
    assert {stage for stage, _ in ran} == {"quantize", "export", "evaluate", "compare"}
    assert {name for _, name in ran} == {"gptq-w4g128", "onnx-int4-gptq", None}
    rows = clone.report()
    assert rows["gptq-w4g128"]["metrics"]["mean_kld"] > figures["gptq-w4g128"]["mean_kld"]
    assert rows["bf16"]["metrics"] == figures["bf16"]
    assert "three-bits" in clone.dvc("exp", "show", "--csv")
    assert "gptq-w4g128" in clone.dvc("metrics", "show")
    shown = clone.dvc("plots", "show", "--json")
    assert "size against divergence" in shown and "mean_kld_front" in shown and "error" not in shown

    # An edit of conf/ that was not composed is noticed before anything runs on old settings.
    recipe = clone.root / "conf/recipe/q8_0.yaml"
    recipe.write_text(recipe.read_text().replace("importance: false", "importance: true"))
    said = clone.run(sys.executable, "-m", "dvc", "repro", expect=255)
    assert "config_stale" in said and "quantline compose" in said
