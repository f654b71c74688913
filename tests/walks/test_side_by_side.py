"""`quantline repro --jobs 2` gives what a serial run gives, and what fails takes little along."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.clone import Clone
from tests.helpers.project import tiny_inputs


def outs(clone: Clone) -> dict[str, Any]:
    """Return what each recipe and each export has made.

    A bundle also has the seconds of its smoke test, so that its files count by their own hash.
    """
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())["stages"]
    found = {name: entry["outs"] for name, entry in lock.items() if name.startswith("quantize@")}
    for path in sorted((clone.root / "artifacts/exports").glob("*/manifest.json")):
        found[f"export@{path.parent.name}"] = json.loads(path.read_text())["artifact_sha256"]
    return found


def forget(clone: Clone) -> None:
    """Remove all that was made."""
    for name in ("artifacts", "metrics", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(clone.root / name)
    (clone.root / "dvc.lock").unlink()


@pytest.mark.slow
@pytest.mark.e2e
def test_recipes_side_by_side_give_what_a_serial_run_gives(
    tmp_path, make_model, texts, empty_database
):
    make_model(tmp_path / "model", intermediate_size=320, num_hidden_layers=1)
    choice = [
        "recipe=[none,q8_0,rtn-w4g32,gptq-w4g32]",
        "variant=[bf16,gguf-q8_0,rtn-w4g32,gptq-w4g32]",
        *tiny_inputs(tmp_path / "model", Path(texts)),
        "evaluation.speed.threads=1",
        "target=any",
        "target.gates=[]",
    ]
    clone = Clone.begin(tmp_path / "clone", choice)
    shutil.copy(empty_database, clone.root / "mlflow.db")
    clone.quantline("repro")
    serial, figures = outs(clone), clone.figures()
    assert len(serial) == 8
    forget(clone)
    assert "side by side: 8 stages" in clone.quantline("repro", "--jobs", "2")
    assert outs(clone) == serial
    assert clone.figures() == figures
    assert "up to date" in clone.dvc("repro")
    assert "side by side" not in clone.quantline("repro", "--jobs", "2")

    # One recipe that does not fit the width of 320: the others are there, and it has run once.
    before = len(clone.finished())
    words = clone.quantline("repro", "--jobs", "2", "recipes.rtn-w4g32.group_size=128", expect=1)
    assert words.count("quantize rtn-w4g32: export_quantization_failed") == 1
    rows = clone.report()
    assert {name for name, row in rows.items() if row["status"] != "ok"} == {"rtn-w4g32"}
    assert {stage for stage, _ in clone.finished()[before:]} == {"check", "compare"}
