"""What stages read: the same for DVC and for the lineage, hashed, and held until the end."""

from pathlib import Path

import pytest
import yaml

from quantline.config.compose import load_params
from quantline.errors import Failure, StageError, StaleError
from quantline.files import sha256_file, write_json, write_text
from quantline.paths import CALIBRATION, CHECKED, MODEL
from quantline.run.lineage import Lineage, artifact_id, lineage_file, read_lineage, write_lineage
from quantline.run.stage_inputs import READS, StageInputs, reads_of
from tests.helpers.project import ROOT

DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def dvc_stage(name: str) -> dict:
    return DVC[name].get("do", DVC[name])


@pytest.mark.parametrize("stage", READS)
def test_reads_are_those_of_dvc(stage):
    written = {name.replace("${key}", "NAME") for name in dvc_stage(stage)["params"]}
    reads = READS[stage].params
    assert {name.format(recipe="NAME", variant="NAME") for name in reads} == written
    deps = [dep for dep in dvc_stage(stage)["deps"] if dep != str(CHECKED)]
    artifacts = [dep for dep in deps if dep.startswith("artifacts/")]
    named = {
        dep.removeprefix("artifacts/").replace("${key}", "NAME").replace("${item.recipe}", "RECIPE")
        for dep in artifacts
    }
    recipe = "NAME" if stage == "quantize" else "RECIPE"
    found = {name.format(recipe=recipe, variant="NAME") for name in READS[stage].artifacts}
    assert found == named


def test_every_stage_that_makes_an_artifact_is_listed():
    makers = {name for name in DVC if name not in ("check", "compare")}
    assert READS.keys() == makers


def test_reads_of_an_export_names_the_recipe_of_its_variant(project):
    params = load_params()
    artifacts = ("model", "answers", "quantized/q4_k_m")
    assert reads_of("export", "gguf-q4_k_m", params).artifacts == artifacts


@pytest.fixture
def inputs(project) -> StageInputs:
    """Of calibrate, beside a model."""
    write_json(MODEL / "manifest.json", {"a": 1})
    made_from = Lineage(params={"model.path": "m"}, files={"m/config.json": "0"})
    write_lineage(MODEL, lineage_file("model"), made_from, ["manifest.json"])
    return StageInputs("calibrate", None, load_params())


def test_record_passes_on_what_led_to_the_artifacts_that_were_read(inputs, texts):
    write_text(CALIBRATION / "calibration.json", "{}")
    write_text(CALIBRATION / "inputs/block.bin", "x")
    inputs.record(CALIBRATION)
    lineage = read_lineage("calibration")
    assert lineage is not None
    assert lineage.params["model.path"] == "m"
    assert lineage.params["calibration.length"] == 64
    assert lineage.params["seed"] == load_params().seed
    assert not [key for key in lineage.params if key.startswith("evaluation")]
    text = texts / "calibration.txt"
    assert lineage.files == {"m/config.json": "0", str(text): sha256_file(text)}
    assert lineage.artifacts == {"model": artifact_id("model")}
    assert lineage.contents == {
        name: sha256_file(CALIBRATION / name) for name in ("calibration.json", "inputs/block.bin")
    }


def test_record_refuses_parameters_that_changed_while_the_stage_ran(inputs, project):
    project.compose("calibration.length=32")
    with pytest.raises(StaleError, match=r"params\.yaml to stay as it was while calibrate ran"):
        inputs.record(CALIBRATION)
    project.compose("evaluation.speed.repetitions=2")  # which calibrate does not read
    write_text(CALIBRATION / "calibration.json", "{}")
    inputs.record(CALIBRATION)


@pytest.mark.parametrize("changed", ["text", "artifact"])
def test_record_refuses_inputs_that_changed_while_the_stage_ran(project, tmp_path, changed):
    write_json(MODEL / "manifest.json", {})
    write_lineage(MODEL, lineage_file("model"), Lineage(), [])
    text = tmp_path / "text.txt"
    text.write_text("one")
    project.compose(f"calibration.path={text}")
    inputs = StageInputs("calibrate", None, load_params())
    if changed == "text":
        text.write_text("two")
    else:
        write_lineage(MODEL, lineage_file("model"), Lineage(params={"a": 1}), [])
    with pytest.raises(StageError, match="to stay as it was while the stage ran") as caught:
        inputs.made_from({})
    assert caught.value.failure == Failure.ARTIFACT_CHANGED


def test_stage_inputs_refuses_an_artifact_with_another_byte(inputs):
    path = MODEL / "manifest.json"
    Path(path).write_text(path.read_text().replace("1", "2"))
    with pytest.raises(StageError, match=r"manifest\.json is not what its stage wrote") as caught:
        StageInputs("calibrate", None, load_params())
    assert caught.value.failure == Failure.ARTIFACT_CHANGED
    assert "dvc repro --force --single-item load" in str(caught.value)


def test_made_from_refuses_artifacts_that_were_made_from_different_things(project):
    for artifact, model in (("exports/bf16", "a"), ("reference", "b")):
        lineage = Lineage(artifacts={"model": model})
        write_lineage(lineage_file(artifact).parent, lineage_file(artifact), lineage, [])
    inputs = StageInputs("evaluate", "bf16", load_params())
    with pytest.raises(StageError, match="expected reference to be made from the present model"):
        inputs.made_from({})
