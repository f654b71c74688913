"""A bundle that is not what was exported is refused by evaluate and by compare, in every container, by name."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, Project
from test_compare import figures

from stages import compare, evaluate
from quantline.config.compose import load_params
from quantline.errors import Failure

PAIRS = {"gguf": ("gguf-f32", "gguf-f16", "model.gguf"), "safetensors": ("bf16", "int8", "model.safetensors"),
         "onnx": ("onnx-fp32", "onnx-int8", "model.onnx")}
VARIANTS = sorted(name for *pair, _ in PAIRS.values() for name in pair)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_model, texts, empty_database) -> Path:
    """A project with two bundles of each container."""
    root = tmp_path_factory.mktemp("tampering")
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root / "dvc.yaml")
    shutil.copy(empty_database, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = Project(root, tiny_model, texts)
        made.compose(f"variant=[{','.join(VARIANTS)}]", "recipe=[none,int8]")
        for name, instance in (("load", None), ("calibrate", None), ("quantize", "none"), ("quantize", "int8")):
            made.stage(name, instance)
        for name in VARIANTS:
            made.stage("export", name)
    return root


@pytest.fixture
def tampered(bundles, tmp_path, monkeypatch, tiny_model, texts) -> Project:
    """A copy of it, with figures that belong to the bundles as they were exported."""
    root = tmp_path / "project"
    shutil.copytree(bundles, root)
    monkeypatch.chdir(root)
    for name in VARIANTS:
        manifest = json.loads((evaluate.EXPORTS / name / "manifest.json").read_text())
        figures(name, 5, 0.001, manifest["artifact_sha256"], manifest["runtime"])
    return Project(root, tiny_model, texts)


def exchange(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_files(folder: Path, other: Path, file: str) -> str:
    exchange(folder / file, other / file)
    return f"{file} is not what its manifest says: expected "


def swap_bundles(folder: Path, other: Path, file: str) -> str:
    exchange(folder, other)
    return f"expected the bundle of {folder.name} at {folder}, found that of {other.name}"


def truncate(folder: Path, other: Path, file: str) -> str:
    with (folder / file).open("r+b") as opened:
        size = opened.seek(0, 2)
        opened.truncate(size - 1)
    return f"expected {size} bytes with sha256"


def edit_one_byte(folder: Path, other: Path, file: str) -> str:
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    return f"{file} is not what its manifest says: expected {len(data)} bytes"


def edit_the_tokenizer(folder: Path, other: Path, file: str) -> str:
    (folder / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text().replace("256", "257"))
    return "tokenizer_config.json is not what its manifest says"


def remove(folder: Path, other: Path, file: str) -> str:
    (folder / file).unlink()
    return f"{file} is not what its manifest says: expected "


@pytest.mark.parametrize("container", PAIRS)
@pytest.mark.parametrize("tamper", [swap_files, swap_bundles, truncate, edit_one_byte, edit_the_tokenizer, remove])
def test_it_is_refused(container, tamper, tampered, capsys):
    name, other, file = PAIRS[container]
    assert compare.row_of(name, load_params())["status"] == "ok"
    if not (evaluate.EXPORTS / name / "tokenizer_config.json").is_file() and tamper is edit_the_tokenizer:
        pytest.skip("the tokenizer lies in the container itself")
    words = tamper(evaluate.EXPORTS / name, evaluate.EXPORTS / other, file)
    row = compare.row_of(name, load_params())
    assert (row["status"], row["failure"], row["metrics"]) == ("failed", Failure.ARTIFACT_CHANGED, {})
    assert words in row["message"] and "export the variant again" in row["message"]
    shutil.rmtree(evaluate.METRICS)
    with pytest.raises(SystemExit) as stop:
        tampered.stage("evaluate", name)
    assert stop.value.code == 1 and words in capsys.readouterr().err
    assert tampered.events()[-1]["payload"]["failure"] == Failure.ARTIFACT_CHANGED
    assert not evaluate.METRICS.exists()


@pytest.mark.parametrize("of", ["{}.json", "{}.speed.json", "items/{}.json"])
def test_figures_of_two_variants_that_change_places_are_refused(of, tampered):
    files = [evaluate.METRICS / of.format(name) for name in ("bf16", "int8")]
    exchange(*files)
    for name, file in zip(("bf16", "int8"), files, strict=True):
        row = compare.row_of(name, load_params())
        assert (row["status"], row["failure"], row["metrics"]) == ("failed", Failure.ARTIFACT_CHANGED, {})
        assert f"{file} belongs to other bytes than the bundle" in row["message"]


def test_answers_that_were_edited_or_are_gone_are_refused(tampered):
    path = evaluate.METRICS / "items/bf16.json"
    path.write_text(path.read_text().replace("true", "false", 1))
    assert compare.row_of("bf16", load_params())["failure"] == Failure.ARTIFACT_CHANGED
    path.unlink()
    assert compare.row_of("bf16", load_params())["failure"] == Failure.ARTIFACT_CHANGED


def test_the_report_picks_no_variant_that_was_tampered_with(tampered):
    tampered.stage("compare")
    report = json.loads((compare.REPORTS / "compression.json").read_text())
    chosen, file = report["pick"], {one[i]: one[2] for one in PAIRS.values() for i in (0, 1)}
    edit_one_byte(evaluate.EXPORTS / chosen, Path(), file[chosen])
    tampered.stage("compare")
    report = json.loads((compare.REPORTS / "compression.json").read_text())
    assert report["pick"] not in (None, chosen)
    assert next(row["failure"] for row in report["variants"] if row["variant"] == chosen) == "artifact_changed"
