"""Figures are those of the present parameters, files and artifacts, or they are stale."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from quantline.config.compose import load_params
from quantline.errors import Failure
from quantline.files import read_json
from quantline.metrics.results import ResultFiles, write_lm_eval
from quantline.paths import EXPORTS, METRICS, MODEL
from quantline.report.build import collect_report
from quantline.report.chain import stale_links, stale_stages
from quantline.report.rows import read_row
from quantline.run.lineage import lineage_file, read_lineage
from tests.helpers.changes import changed, flip_one_byte
from tests.helpers.command_line import quantline
from tests.helpers.project import Project
from tests.report.conftest import copy_of

pytestmark = pytest.mark.xdist_group("chain")  # one measured variant for all

VARIANT = "gguf-q4_k_m"
OVERRIDES = ["model.adapter=mine/adapter", "target=any", "target.gates=[]"]


@pytest.fixture
def project(measured, tmp_path, monkeypatch) -> Project:
    """A copy of it, as the working folder."""
    return copy_of(measured, tmp_path, monkeypatch)


def test_a_file_that_is_new_beside_the_model_makes_figures_stale(project):
    Path("mine/model/notes.md").touch()  # nothing of a checkpoint
    assert stale_links(VARIANT, load_params()) == []
    Path("mine/model/chat_template.jinja").rename("mine/model/tokenizer.model")
    stale = stale_links(VARIANT, load_params())
    assert [(link.stage, link.reason) for link in stale[:1]] == [
        ("load", "mine/model/ has other files now")
    ]


@pytest.mark.parametrize("name", ["model/config.json", "reference/reference.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tokens": {}, "model_type": 3}', "\0"])
def test_a_torn_file_of_an_artifact_is_named_in_the_row_and_takes_nothing_down(
    project, name, content
):
    path = Path("artifacts") / name
    path.unlink()
    path.write_text(content)
    report = collect_report(load_params())
    assert report.pick is None
    for row in report.variants:
        assert row.failure == Failure.ARTIFACT_CHANGED
        assert str(path) in str(row.message)


def test_a_result_of_lm_eval_is_shown_only_as_its_stage_wrote_it(project):
    files = ResultFiles.of(METRICS, VARIANT)
    manifest = read_json(EXPORTS / VARIANT / "manifest.json")
    task = {"mine": {"metrics": {"acc,none": {"value": 0.5}}}}
    write_lm_eval(files, manifest, "llama.cpp", {"tasks": task})
    assert read_row(VARIANT, load_params()).lm_eval == task
    files.lm_eval.write_text(files.lm_eval.read_text().replace("0.5", "0.9"))
    row = read_row(VARIANT, load_params())
    assert row.failure == Failure.ARTIFACT_CHANGED
    assert "quantline lm-eval" in str(row.message)


def test_figures_of_the_present_project_are_shown(project):
    assert stale_links(VARIANT, load_params()) == []
    assert read_row(VARIANT, load_params()).status == "ok"
    done = quantline("gate")
    assert done.exit_code == 0, done.output


def test_each_parameter_that_led_to_a_figure_makes_it_stale(project):
    lineage = read_lineage(f"metrics/{VARIANT}")
    assert lineage is not None
    values = yaml.safe_load(Path("params.yaml").read_text())
    tried = 0
    for key in sorted(lineage.params):
        params = changed(values, key)
        if params is None:
            continue
        tried += 1
        reasons = [link.reason for link in stale_links(VARIANT, params)]
        assert any(f"{key} was" in reason for reason in reasons), key
    assert tried > 0.6 * len(lineage.params)


def test_parameters_that_no_figure_depends_on_leave_it_alone(project):
    values = yaml.safe_load(Path("params.yaml").read_text())
    for key in ("target.max_size_mib", "evaluation.limits.seconds"):
        params = changed(values, key)
        assert params is not None
        assert stale_links(VARIANT, params) == []


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("mine/model/config.json", "load"),
        ("mine/model/tokenizer.json", "load"),
        ("mine/model/model.safetensors", "load"),
        ("mine/texts/calibration.txt", "calibrate"),
        ("mine/texts/evaluation.txt", "reference"),
        ("mine/texts/gold.jsonl", "reference"),
    ],
)
def test_each_file_of_the_user_makes_figures_stale_to_the_byte(project, path, stage):
    flip_one_byte(Path(path))
    links = stale_links(VARIANT, load_params())
    assert links[0].stage == stage
    assert f"{path} has changed since" in links[0].reason
    done = quantline("gate", VARIANT)
    assert done.exit_code == 1
    assert f"{path} has changed since" in done.output
    assert "run `quantline repro`" in done.output


@pytest.mark.parametrize(
    "artifact", ["model", "calibration", "reference", "quantized/q4_k_m", f"exports/{VARIANT}"]
)
def test_an_artifact_that_was_made_again_otherwise_makes_figures_stale(project, artifact):
    path = lineage_file(artifact)
    path.write_text(path.read_text().replace('"seed"', '"sead"').replace("}", "} ", 1))
    reasons = [link.reason for link in stale_links(VARIANT, load_params())]
    assert f"{artifact} was made again since" in reasons
    assert quantline("gate", VARIANT).exit_code == 1


def bundle_files() -> list[str]:
    return ["*.gguf", "manifest.json", "README.md", "lineage.json"]


@pytest.mark.parametrize("name", bundle_files())
def test_one_byte_of_a_bundle_is_noticed(project, name):
    (path,) = (EXPORTS / VARIANT).glob(name)
    flip_one_byte(path)
    row = read_row(VARIANT, load_params())
    assert row.status != "ok"
    assert quantline("gate", VARIANT).exit_code == 1
    assert quantline("verify").exit_code == 1


@pytest.mark.parametrize("name", ["{}.json", "{}.speed.json", "items/{}.json", "lineage/{}.json"])
def test_one_byte_of_the_figures_is_noticed(project, name):
    path = METRICS / name.format(VARIANT)
    text = path.read_text()
    digit = next(index for index, letter in enumerate(text) if letter in "12345678")
    path.write_text(text[:digit] + str(int(text[digit]) + 1) + text[digit + 1 :])
    assert read_row(VARIANT, load_params()).status != "ok"
    assert quantline("gate", VARIANT).exit_code == 1
    assert quantline("verify", VARIANT).exit_code == 1


def test_figures_without_a_lineage_are_stale(project):
    (METRICS / f"lineage/{VARIANT}.json").unlink()
    row = read_row(VARIANT, load_params())
    assert (row.status, row.failure) == ("stale", Failure.STALE)
    assert f"dvc repro --force --single-item evaluate@{VARIANT}" in str(row.message)


def test_figures_whose_artifacts_are_elsewhere_are_judged_by_their_lineage(project):
    for name in ("calibration", "reference", "quantized"):
        shutil.rmtree(Path("artifacts") / name)
    shutil.rmtree(MODEL)
    assert stale_links(VARIANT, load_params()) == []
    flip_one_byte(Path("mine/texts/calibration.txt"))
    assert stale_links(VARIANT, load_params())[0].stage == "calibrate"


def test_a_model_that_is_refused_shows_nothing_of_the_one_before(project, capsys):
    other = Path("mine/other")
    shutil.copytree("mine/model", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))
    project.base = [
        f"model.path={other}" if one.startswith("model.path") else one for one in project.base
    ]
    project.compose(f"variant=[{VARIANT}]", "recipe=[q4_k_m]", *OVERRIDES)
    with pytest.raises(SystemExit):
        project.stage("load")
    project.stage("compare")
    report = json.loads(Path("reports/compression.json").read_text())
    assert report["pick"] is None
    (row,) = report["variants"]
    assert (row["status"], row["metrics"]) == ("stale", {})
    assert "model.path was mine/model and is mine/other" in row["message"]
    assert "load_rejected" in row["message"] or "unsupported" in row["message"]
    assert "stale" in Path("reports/compression.md").read_text()
    assert "model.path was mine/model" in Path("reports/compression.html").read_text()
    for command in ("gate", "pick"):
        done = quantline(command)
        assert done.exit_code == 1
        assert "run `quantline repro`" in done.output


def test_stale_stages_come_in_the_order_in_which_they_run(project):
    flip_one_byte(Path("mine/texts/evaluation.txt"))
    values = yaml.safe_load(Path("params.yaml").read_text())
    params = changed(values, "evaluation.speed.repetitions")
    assert params is not None
    stages = [link.stage for link in stale_stages(params)]
    assert stages == ["reference", f"evaluate@{VARIANT}", "evaluate@gguf-q4_k_s"]


def test_figures_of_a_model_that_only_a_colleague_has_are_not_stale(project):
    shutil.rmtree("mine/model")
    shutil.rmtree(MODEL)  # what load made of it, too
    assert [link.stage for link in stale_links(VARIANT, load_params())] == []
