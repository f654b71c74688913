"""A bundle is what its manifest says, to the byte; tests/faults does worse to it."""

import json
from pathlib import Path

import pytest

from quantline.errors import Failure, Reason, StageError
from quantline.files import describe_files
from quantline.formats.bundle.manifest import check_bundle, files_of_bundle


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle of two files, one in a folder of its own."""
    folder = tmp_path / "variant"
    (folder / "inside").mkdir(parents=True)
    (folder / "model.gguf").write_text("weights")
    (folder / "inside/tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("how to serve it")
    files = describe_files(folder, ["model.gguf", "inside/tokenizer.json"])
    manifest = {"variant": "variant", "files": files, "artifact_sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_check_bundle_returns_the_manifest_of_files_that_are_as_it_says(bundle):
    manifest = check_bundle(bundle)
    assert manifest["files"] == files_of_bundle(bundle)
    assert sorted(manifest["files"]) == ["inside/tokenizer.json", "model.gguf"]


def change(bundle: Path) -> None:
    (bundle / "model.gguf").write_text("wEights")


def remove(bundle: Path) -> None:
    (bundle / "inside/tokenizer.json").unlink()


def add(bundle: Path) -> None:
    (bundle / "extra").write_text("")


def add_below(bundle: Path) -> None:
    (bundle / "inside/README.md").write_text("none of the bundle's own descriptions")


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (add_below, r"inside/README\.md is not .*: expected no such file, found 37 bytes"),
        (change, r"model\.gguf is not .*: expected 7 bytes with sha256 .*, found 7 bytes"),
        (remove, r"tokenizer\.json is not .*: expected 2 bytes .*, found no such file"),
        (add, r"extra is not .*: expected no such file, found 0 bytes"),
    ],
)
def test_check_bundle_refuses_files_that_are_not(bundle, tamper, words):
    tamper(bundle)
    with pytest.raises(StageError, match=words) as caught:
        check_bundle(bundle)
    assert caught.value.failure == Failure.ARTIFACT_CHANGED
    assert "export the variant again" in str(caught.value)


def test_check_bundle_refuses_the_bundle_of_another_variant(bundle):
    moved = bundle.rename(bundle.parent / "other")
    with pytest.raises(StageError, match=r"expected the bundle of other .*found that of variant"):
        check_bundle(moved)


def test_check_bundle_names_a_bundle_that_is_missing(tmp_path):
    with pytest.raises(StageError, match="export it first") as caught:
        check_bundle(tmp_path / "none")
    assert caught.value.failure == Failure.MISSING_FILE
    assert caught.value.reason == Reason.EXPORT_ARTIFACT_MISSING
