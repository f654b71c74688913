"""A bundle that is not what was exported is refused by evaluate and compare, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantline.config.compose import load_params
from quantline.errors import Failure
from quantline.paths import EXPORTS, METRICS, REPORTS
from quantline.report.rows import VariantRow, read_row
from tests.helpers.children import fork_children
from tests.helpers.project import Project, begin_project
from tests.helpers.report import write_figures

pytestmark = pytest.mark.xdist_group("tampering")  # one set of bundles for all

# Container → two variants in it, and the file of the weights.
PAIRS = {
    "gguf": ("gguf-f32", "gguf-f16", "*.gguf"),
    "safetensors": ("bf16", "int8", "model.safetensors"),
    "onnx": ("onnx-fp32", "onnx-int8", "model.onnx"),
}
WEIGHTS: dict[str, str] = {}  # variant → the file of its weights
for first, second, file in PAIRS.values():
    WEIGHTS |= {first: file, second: file}
VARIANTS = sorted(WEIGHTS)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_model, texts, empty_database) -> Path:
    """A project with two bundles of each container."""
    root = begin_project(tmp_path_factory.mktemp("tampering"))
    shutil.copy(empty_database, root / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fork_children(patch)
        project = Project(root, tiny_model, texts)
        project.compose(
            f"variant=[{','.join(VARIANTS)}]",
            "recipe=[none,int8]",
            "variants.onnx-int8.recipe=int8",
        )
        project.stage("load")
        project.stage("calibrate")
        for recipe in ("none", "int8"):
            project.stage("quantize", recipe)
        for variant in VARIANTS:
            project.stage("export", variant)
    return root


@pytest.fixture
def project(bundles, tmp_path, monkeypatch, tiny_model, texts) -> Project:
    """A copy of it, with figures that belong to the bundles as they were exported."""
    root = tmp_path / "project"
    shutil.copytree(bundles, root)
    monkeypatch.chdir(root)
    for name in VARIANTS:
        manifest = json.loads((EXPORTS / name / "manifest.json").read_text())
        write_figures(name, 5, 0.001, manifest["artifact_sha256"], manifest["runtime"])
    return Project(root, tiny_model, texts)


def row_of(name: str) -> VariantRow:
    return read_row(name, load_params())


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


# Each of these changes the bundle in a folder, beside another of the same container, and returns
# words of the message that it has to lead to.
Tamper = Callable[[Path, Path, str], str]


def weights_in(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def swap_files(folder: Path, other: Path, file: str) -> str:
    path = weights_in(folder, file)
    swap(path, weights_in(other, file))
    return f"{path.name} is not what its manifest says: expected "


def swap_bundles(folder: Path, other: Path, file: str) -> str:
    swap(folder, other)
    return f"expected the bundle of {folder.name} at {folder}, found that of {other.name}"


def truncate(folder: Path, other: Path, file: str) -> str:
    with weights_in(folder, file).open("r+b") as opened:
        size = opened.seek(0, 2)
        opened.truncate(size - 1)
    return f"expected {size} bytes with sha256"


def edit_one_byte(folder: Path, other: Path, file: str) -> str:
    path = weights_in(folder, file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return f"{path.name} is not what its manifest says: expected {len(data)} bytes"


def edit_the_tokenizer(folder: Path, other: Path, file: str) -> str:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip("the tokenizer lies in the container itself")
    text = path.read_text()
    assert "256" in text
    path.write_text(text.replace("256", "257"))
    return "tokenizer_config.json is not what its manifest says"


def remove(folder: Path, other: Path, file: str) -> str:
    path = weights_in(folder, file)
    path.unlink()
    return f"{path.name} is not what its manifest says: expected "


TAMPERS: list[Tamper] = [
    swap_files,
    swap_bundles,
    truncate,
    edit_one_byte,
    edit_the_tokenizer,
    remove,
]


@pytest.mark.parametrize("container", PAIRS)
@pytest.mark.parametrize("tamper", TAMPERS)
def test_evaluate_and_compare_refuse_a_tampered_bundle(container, tamper, project, capsys):
    name, other, file = PAIRS[container]
    assert row_of(name).status == "ok"
    words = tamper(EXPORTS / name, EXPORTS / other, file)
    row = row_of(name)
    assert (row.status, row.failure) == ("failed", Failure.ARTIFACT_CHANGED)
    assert row.metrics == {}
    assert words in row.message
    assert "export the variant again" in row.message
    shutil.rmtree(METRICS)
    with pytest.raises(SystemExit) as stopped:
        project.stage("evaluate", name)
    assert stopped.value.code == 1
    assert words in capsys.readouterr().err
    assert project.events()[-1]["payload"]["failure"] == Failure.ARTIFACT_CHANGED
    assert not METRICS.exists()


@pytest.mark.parametrize("pattern", ["{}.json", "{}.speed.json", "items/{}.json"])
def test_read_row_refuses_figures_of_two_variants_that_change_places(pattern, project):
    files = {name: METRICS / pattern.format(name) for name in ("bf16", "int8")}
    swap(*files.values())
    for name, file in files.items():
        row = row_of(name)
        assert (row.status, row.failure) == ("failed", Failure.ARTIFACT_CHANGED)
        assert row.metrics == {}
        assert f"{file} belongs to other bytes than the bundle" in row.message


def test_read_row_refuses_answers_that_were_edited_or_are_gone(project):
    path = METRICS / "items/bf16.json"
    text = path.read_text()
    assert "true" in text
    path.write_text(text.replace("true", "false", 1))
    assert row_of("bf16").failure == Failure.ARTIFACT_CHANGED
    path.unlink()
    assert row_of("bf16").failure == Failure.ARTIFACT_CHANGED


def test_compare_picks_no_variant_that_was_tampered_with(project):
    project.stage("compare")
    pick = json.loads((REPORTS / "compression.json").read_text())["pick"]
    edit_one_byte(EXPORTS / pick, Path(), WEIGHTS[pick])
    project.stage("compare")
    report = json.loads((REPORTS / "compression.json").read_text())
    assert report["pick"] not in (None, pick)
    failures = {row["variant"]: row["failure"] for row in report["variants"]}
    assert failures[pick] == "artifact_changed"
