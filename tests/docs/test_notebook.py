"""The page "In a notebook" is a program that runs."""

import os
import subprocess
import sys

import pytest

import quantline
from tests.helpers.docs import blocks
from tests.helpers.project import ROOT

CODE = [block.code for block in blocks(ROOT / "docs/notebook.md") if block.language == "python"]


@pytest.mark.slow
def test_notebook_runs_from_a_checkpoint_to_a_decision(make_model, texts, tmp_path):
    # A random model answers by luck: that of another seed says one token, which is refused.
    make_model(tmp_path / "model", seed=1)
    for name in ("calibration.txt", "evaluation.txt"):
        (tmp_path / name).symlink_to(texts / name)
    (tmp_path / "questions.jsonl").symlink_to(texts / "gold.jsonl")
    (tmp_path / "notebook.py").write_text("\n".join(CODE))
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Ship for my laptop: " in done.stdout
    assert (tmp_path / "work/metrics/onnx-gptq.json").is_file()


def test_notebook_documents_every_public_call():
    text = (ROOT / "docs/notebook.md").read_text()
    assert quantline.__all__
    for name in quantline.__all__:
        assert f":: quantline.{name}\n" in text
