"""A bundle by itself: its files, its manifest, and figures that belong to its bytes."""

import json
from pathlib import Path

import pytest

from quantline.errors import Failure, StageError
from quantline.files import describe_files, sha256_json, write_json
from quantline.formats.bundle.manifest import MANIFEST
from quantline.report.verification import verify_bundle
from quantline.run.lineage import LINEAGE, Lineage, write_lineage
from tests.helpers.command_line import quantline


@pytest.fixture
def bundle(tmp_path, monkeypatch) -> Path:
    """A bundle in a folder of another name, far from any project."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / "model.gguf").write_text("weights")
    files = describe_files(folder, ["model.gguf"])
    sha256 = sha256_json({name: entry["sha256"] for name, entry in files.items()})
    manifest = {"variant": "gguf-q4_k_m", "files": files, "artifact_sha256": sha256}
    write_json(folder / MANIFEST, manifest)
    write_lineage(folder, folder / LINEAGE, Lineage(), [MANIFEST])
    return folder


def figures_of(bundle: Path) -> Path:
    manifest = json.loads((bundle / MANIFEST).read_text())
    path = bundle.parent / "figures.json"
    write_json(path, {"artifact_sha256": manifest["artifact_sha256"], "mean_kld": 0.1})
    return path


def test_verify_bundle_says_what_it_found(bundle):
    sentence = verify_bundle(bundle)
    assert "gguf-q4_k_m, sha256 " in sentence
    assert "1 files, 0.0 MiB as exported; no figures were given" in sentence
    figures = figures_of(bundle)
    assert verify_bundle(bundle, figures).endswith(f"{figures} was measured on these bytes")


def test_verify_bundle_refuses_figures_of_other_bytes(bundle):
    figures = figures_of(bundle)
    write_json(figures, {"artifact_sha256": "0" * 64})
    with pytest.raises(StageError, match="measure the bundle again") as caught:
        verify_bundle(bundle, figures)
    assert caught.value.failure == Failure.ARTIFACT_CHANGED


def edit_manifest(bundle: Path, **changes) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    write_json(bundle / MANIFEST, manifest | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"artifact_sha256": "0" * 64}, "contradicts itself"),
        ({"bits_per_weight": 2.0}, "is not what its stage wrote"),
        ({"files": {}}, "found 7 bytes"),
        ({"files": 3}, "without a table of files"),
    ],
)
def test_verify_bundle_refuses_an_edited_manifest(bundle, changes, words):
    edit_manifest(bundle, **changes)
    with pytest.raises(StageError, match=words):
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["README.md", "smoke.json"])
def test_verify_bundle_refuses_another_file_that_describes_it(bundle, name):
    (bundle / name).write_text("as exported")
    write_lineage(bundle, bundle / LINEAGE, Lineage(), [MANIFEST, name])
    verify_bundle(bundle)
    (bundle / name).write_text("run this instead")
    with pytest.raises(StageError, match=f"{name} is not what its stage wrote"):
        verify_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(StageError, match=f"{name} is not what its stage wrote"):
        verify_bundle(bundle)


def test_verify_bundle_refuses_figures_that_were_edited_beside_their_lineage(bundle):
    figures = figures_of(bundle)
    lineage = figures.parent / "lineage" / figures.name
    write_lineage(figures.parent, lineage, Lineage(), [figures.name])
    verify_bundle(bundle, figures)
    write_json(figures, json.loads(figures.read_text()) | {"mean_kld": 0.00001})
    with pytest.raises(StageError, match="is not what its stage wrote; measure the bundle again"):
        verify_bundle(bundle, figures)


@pytest.mark.parametrize("names", [["gguf-q4_k_m"], [], ["downloaded", "downloaded"]])
def test_verify_takes_figures_with_the_folder_of_one_bundle_alone(bundle, names):
    done = quantline("verify", *names, "--figures", str(figures_of(bundle)))
    assert done.exit_code == 1
    assert "expected the folder of one bundle with --figures" in done.output


def test_verify_works_without_a_project_and_ends_with_its_verdict(bundle):
    figures = str(figures_of(bundle))
    assert quantline("verify", str(bundle), "--figures", figures).exit_code == 0
    (bundle / "model.gguf").write_text("wEights")
    done = quantline("verify", str(bundle))
    assert done.exit_code == 1
    assert "artifact_changed" in done.output
    assert "model.gguf is not what its manifest says" in done.output


def test_verify_says_what_it_takes(bundle):
    done = quantline("verify", "nothing")
    assert done.exit_code == 1
    assert "expected dvc.yaml and conf/" in done.output
