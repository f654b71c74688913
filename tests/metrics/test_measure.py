"""The measuring process: what it imports, and what it hands back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantline.config.texts import Limits, Speed
from quantline.metrics import measure, measuring_process
from quantline.metrics.measuring_process import Measuring, measure_in_child
from quantline.run.child_process import call_in_child
from tests.helpers.capped_model import CappedModel
from tests.helpers.project import ROOT


def test_measure_bundle_measures_speed_first_and_returns_json(tmp_path, monkeypatch):
    runtime = CappedModel(tmp_path)
    opened = []
    steps = []

    def note(name):
        function = getattr(measure, name)

        def noted(*arguments, **options):
            steps.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(measure, name, noted)

    def open_runtime(name, bundle, threads):
        opened.append((name, str(bundle), threads))
        return runtime

    monkeypatch.setattr(measure, "engine_class", lambda name: CappedModel)
    monkeypatch.setattr(measure, "open_runtime", open_runtime)
    note("measure_speed")
    note("measure_quality")
    measured = measure.measure_bundle(
        bundle="bundle",
        runtime="capped",
        reference=str(tmp_path),
        speed={"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2, "threads": 3},
    )
    assert opened == [("capped", "bundle", 3)]
    assert steps == ["measure_speed", "measure_quality"]
    assert set(measured) == {"quality", "items", "speed", "runtime_version"}
    assert measured["runtime_version"] == "1.0"
    assert measured["quality"]["mean_kld"] < 1e-6
    assert measured["speed"]["load_s"] >= 0
    assert measured["speed"]["repetitions"] == 2
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


@pytest.mark.parametrize("runtime", ["llama_cpp", "onnxruntime"])
def test_measure_bundle_in_a_light_runtime_imports_neither_torch_nor_transformers(runtime):
    code = (
        f"import sys, quantline.metrics.measure, quantline.runtimes.{runtime}\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_measuring_process_waits_as_a_server_does(tmp_path, monkeypatch):
    """A stage's threads give up their core at once; llama.cpp would have a fifth of its speed."""
    module = "def call(**arguments):\n    import os\n    return dict(os.environ) | arguments\n"
    (tmp_path / "says.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def says(_function, *rest):
        return call_in_child("says:call", *rest)

    monkeypatch.setattr(measuring_process, "call_in_child", says)
    speed = Speed(prompt_tokens=8, new_tokens=4, repetitions=2)
    measuring = Measuring(Path("b"), "llama.cpp", Path("r"), Limits(seconds=60))
    seen = measure_in_child(measuring, speed)
    assert int(seen["GOMP_SPINCOUNT"]) > 0
    assert os.environ["GOMP_SPINCOUNT"] == "0"
    assert (seen["bundle"], seen["reference"], seen["speed"]["new_tokens"]) == ("b", "r", 4)
