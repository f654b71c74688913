"""Folders and files that appear whole or not at all, their hashes, and JSON."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.files import (
    describe_files,
    folder_bytes,
    read_json,
    read_json_list,
    sha256_file,
    sha256_files,
    sha256_json,
    stamp,
    versions,
    write_json,
    write_tensors,
    write_text,
)

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # sha256 of "abc"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("value", [{"a": float("nan")}, {"a": {1, 2}}])
def test_write_json_refuses_what_json_lacks_and_writes_nothing(tmp_path, value):
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", value)
    assert names(tmp_path) == []


def test_write_json_sorts_keys_and_keeps_letters(tmp_path):
    write_json(tmp_path / "folder/x.json", {"b": "é", "a": [1]})
    text = (tmp_path / "folder/x.json").read_text(encoding="utf-8")
    assert text == '{\n  "a": [\n    1\n  ],\n  "b": "é"\n}\n'
    assert names(tmp_path / "folder") == ["x.json"]


@pytest.mark.parametrize("order", ["C", "F"])
def test_write_tensors_reads_back_whatever_the_order_in_memory(tmp_path, order):
    generator = np.random.default_rng(0)
    tensors = {
        "matrix": np.asarray(generator.normal(size=(3, 5)), order=order),
        "transposed": generator.normal(size=(4, 2, 3)).astype(np.float16).transpose(2, 0, 1),
        "every second": np.arange(10)[::2],
        "number": np.array(3.5),
    }
    write_tensors(tmp_path / "x", tensors, {"format": "pt"})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read[name], values)
        assert read[name].shape == values.shape


def test_write_text_replaces_a_file(tmp_path):
    for text in ("old", "new"):
        write_text(tmp_path / "x", text)
        assert (tmp_path / "x").read_text() == text
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("read", "right", "wrong", "kind"),
    [(read_json, {"a": 1}, [1], "object"), (read_json_list, [1], {"a": 1}, "array")],
)
def test_read_json_refuses_what_is_absent_damaged_or_of_another_kind(
    tmp_path, read, right, wrong, kind
):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(right))
    assert read(path) == right
    for content in (None, b"{", b"\xff", json.dumps(wrong).encode()):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(StageError, match=f"expected a JSON {kind} in ") as error:
            read(path)
        assert error.value.failure == Failure.MISSING_FILE
        path.touch()


def test_sha256_names_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == ABC
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
    assert sha256_json({"a": 1, "b": 2}) != sha256_json({"a": 1})
    assert describe_files(tmp_path, ["x"]) == {"x": {"sha256": ABC, "bytes": 3}}


def test_sha256_files_depends_on_names_bytes_and_where_a_file_ends(tmp_path):
    digests = set()
    for files in ({"a": "xy", "b": "z"}, {"a": "x", "b": "yz"}, {"a": "xy", "c": "z"}):
        folder = tmp_path / str(len(digests))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        paths = sorted(folder.iterdir())
        digests.add(sha256_files(folder, paths))
        assert sha256_files(folder, paths) in digests
    assert len(digests) == 3


def test_stamp_shows_that_a_file_was_replaced(tmp_path):
    path = tmp_path / "x"
    path.write_text("abc")
    before = stamp([path, path])
    assert before == {"x": [3, path.stat().st_mtime_ns]}
    os.utime(path, ns=(1, 1))
    assert stamp([path]) != before


def test_folder_bytes_adds_up_the_files_that_match(tmp_path):
    write_text(tmp_path / "a.bin", "abc")
    write_text(tmp_path / "inner/b.txt", "de")
    assert folder_bytes(tmp_path) == 5
    assert folder_bytes(tmp_path, "*.txt") == 2


def test_versions_are_those_of_the_installed_packages():
    found = versions("numpy", "no-such-package")
    assert found["no-such-package"] == "absent"
    assert found["numpy"][0].isdigit()
