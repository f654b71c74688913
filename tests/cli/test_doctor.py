"""`quantline doctor`: what is missing or stale, and what the run will take."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantline.doctor import needs, packages
from tests.helpers.command_line import quantline


@pytest.fixture
def ready(folder, monkeypatch) -> Path:
    """A project with a model of one block, on a machine of known speed."""
    tensors = {"embed.weight": np.zeros((64, 8)), "layers.0.up.weight": np.zeros((16, 8))}
    save_file(tensors, folder / "demo/model/model.safetensors")
    monkeypatch.setattr(needs, "machine_flops", lambda: 1e11)
    assert quantline("compose", "suite=quick").exit_code == 0
    return folder


def test_doctor_says_what_the_run_takes(ready):
    done = quantline("doctor")
    assert done.exit_code == 0, done.output
    for words in ("configuration: model demo/model", "time: about ", "memory: about ", "disk: "):
        assert words in done.output


def test_doctor_names_a_stale_configuration_and_inputs_that_are_gone(ready):
    (ready / "conf/new.yaml").write_text("{}\n")
    (ready / "demo/data/gold.jsonl").unlink()
    done = quantline("doctor")
    assert done.exit_code == 1
    assert "to mend: params.yaml is stale" in done.output
    assert "to mend: evaluation.gold: there is no demo/data/gold.jsonl" in done.output


def test_doctor_names_too_little_memory_and_disk_before_hours_are_spent(ready, monkeypatch):
    def large(*_: object) -> needs.Needs:
        return needs.Needs({"load": 1.0}, frozenset(), 1e15, "calibrate", 1e15, 2e15)

    monkeypatch.setattr(needs, "needs_of", large)
    done = quantline("doctor")
    assert done.exit_code == 1
    assert "calibrate needs more memory than is free" in done.output
    assert "more disk than is free" in done.output


def test_doctor_names_a_runtime_that_the_suite_needs(ready, monkeypatch):
    absent = packages.Missing("transformers", "no torch", "pip install torch")
    monkeypatch.setattr(packages, "missing_runtimes", lambda: {"transformers": absent})
    done = quantline("doctor")
    assert done.exit_code == 1
    assert "variants.bf16: transformers is not installed: pip install torch" in done.output


def test_doctor_names_what_executor_and_layout_need(ready, monkeypatch):
    known = packages._version
    gone = {"ray": None, "gptqmodel": None}
    monkeypatch.setattr(packages, "_version", lambda name: gone.get(name, known(name)))
    options = ["suite=quick", "executor=ray", "variants.gptq-w4g128.layout=gptq"]
    assert quantline("compose", *options).exit_code == 0
    done = quantline("doctor")
    assert done.exit_code == 1
    assert "executor ray: ray is not installed: pip install 'quantline[ray]'" in done.output
    assert "variants.gptq-w4g128: gptqmodel is not installed" in done.output


def test_a_clone_says_itself_what_it_needs(folder, monkeypatch):
    text = '[project]\nname = "quantline"\ndependencies = ["nothing-like-it>=1"]\n'
    (folder / "pyproject.toml").write_text(
        text + "[project.optional-dependencies]\nown = ['no-such']"
    )
    assert [one.what for one in packages.missing_requirements()] == ["nothing-like-it>=1"]
    assert [one.what for one in packages.missing_extras()] == ["extra own"]


def test_doctor_says_that_a_model_of_the_hub_has_to_be_fetched_first(folder):
    options = ["model=hub", "model.id=owner/name", "calibration=hub", "evaluation=hub"]
    assert quantline("compose", *options).exit_code == 0
    done = quantline("doctor")
    assert done.exit_code == 0, done.output
    assert "`dvc repro load` fetches it" in done.output


def test_requirements_in_other_versions_are_named(monkeypatch):
    monkeypatch.setattr(packages, "_version", lambda name: None if name == "torch" else "999")
    found = {one.what: one.found for one in packages.missing_requirements()}
    assert found["torch==2.13.*"] == "none"
    assert found["numpy<3,>=2"] == "999"
    assert "psutil>=6" not in found
    extras = {one.what for one in packages.missing_extras()}
    assert extras == set()  # by these versions all of them are there
