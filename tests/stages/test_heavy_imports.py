"""A stage loads no more than it needs: the heavy modules of each are listed here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantline.paths import ANSWERS, EXPORTS, MODEL, REFERENCE
from quantline.runtimes.smoke.answers import read_answers
from tests.helpers.children import fork_children
from tests.helpers.project import ROOT, Project

HEAVY = {
    "accelerate", "compressed_tensors", "datasets", "gguf", "huggingface_hub", "jinja2",
    "llama_cpp", "matplotlib", "mlflow", "numba", "onnx", "onnxruntime", "optimum", "pandas",
    "rich", "scipy", "sklearn", "tokenizers", "torch", "transformers",
}  # fmt: skip
# Stage → the heavy modules that its script imports before it knows what it has to do.
IMPORTED = {
    "answer": {
        "accelerate", "huggingface_hub", "jinja2", "scipy", "tokenizers", "torch", "transformers",
    },
    "calibrate": {"tokenizers"},
    "check": set(),
    "compare": {"jinja2"},
    "evaluate": set(),
    "export": set(),
    "lm_eval": set(),
    "load": {"tokenizers"},
    "quantize": {"gguf", "scipy"},
    "reference": {
        "accelerate", "huggingface_hub", "jinja2", "scipy", "tokenizers", "torch", "transformers",
    },
    "smoke": set(),
}  # fmt: skip
GGUF = "gguf-q4_k_m"
RUNTIME = {"gguf", "jinja2", "llama_cpp", "scipy", "tokenizers"}  # of a GGUF bundle's processes


def imported(*command: str, folder: Path) -> set[str]:
    """Return the heavy modules that a Python command imports until it ends, and that it ends well.

    `-X importtime` writes a line for each module, also for those that are imported by functions.
    It leaves out the package itself where importlib imports it, not the modules inside.
    """
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            names.add(line.rpartition("|")[2].strip().partition(".")[0])
    assert "quantline" in names
    return names & HEAVY


# One interpreter for all stages that may import the same.
ALIKE = sorted(
    {tuple(stage for stage in IMPORTED if IMPORTED[stage] == heavy) for heavy in IMPORTED.values()}
)


@pytest.mark.parametrize("stages", ALIKE, ids="-".join)
def test_importing_a_stage_loads(stages):
    code = "import " + ", ".join(f"stages.{stage}" for stage in stages)
    assert imported("-c", code, folder=ROOT) <= IMPORTED[stages[0]]


def test_every_stage_is_listed():
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert scripts == IMPORTED.keys()


@pytest.fixture
def quantized(project) -> Project:
    """The project with everything in place that exporting a GGUF variant needs."""
    for stage in ("load", "answer", "calibrate", "reference"):
        project.stage(stage)
    project.stage("quantize", "q4_k_m")
    return project


@pytest.mark.slow
def test_gguf_is_exported_and_measured_without_torch_numba_and_transformers(quantized):
    """Both stages, up to their last line."""
    root = quantized.root
    tracked = {"mlflow", "pandas", "scipy"}  # MLflow imports the other two
    assert imported("-m", "stages.export", GGUF, folder=root) - tracked <= {
        "gguf",
        "huggingface_hub",  # for the model card
        "tokenizers",
    }
    assert imported("-m", "stages.evaluate", GGUF, folder=root) - tracked == set()


def test_processes_of_a_gguf_bundle_do_without_torch_numba_and_transformers(
    quantized, tmp_path, monkeypatch
):
    """Those that the stages start."""
    root = quantized.root
    with monkeypatch.context() as patch:
        fork_children(patch)
        quantized.stage("export", GGUF)
    smoke = {
        "bundle": str(EXPORTS / GGUF),
        "model": str(MODEL),
        "format": "gguf",
        "runtime": "llama.cpp",
        "answers": read_answers(ANSWERS),
        "tokens": 4,
        "rows": 384,
    }
    measure = {
        "bundle": str(EXPORTS / GGUF),
        "runtime": "llama.cpp",
        "reference": str(REFERENCE),
        "speed": {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 1, "threads": 1},
    }
    calls = {
        "quantline.runtimes.smoke.smoke_test:smoke_test": smoke,
        "quantline.metrics.measure:measure_bundle": measure,
    }
    for function, arguments in calls.items():
        call = tmp_path / "call.json"
        answer = tmp_path / "answer.json"
        call.write_text(json.dumps({"function": function, "arguments": arguments}))
        worker = ("-m", "quantline.run.worker", str(call), str(answer), str(os.getpid()))
        loaded = imported(*worker, folder=root)
        assert "llama_cpp" in loaded
        assert loaded <= RUNTIME
        assert "failure" not in json.loads(answer.read_text())
