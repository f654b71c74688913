"""Bundles and GGUF files that were made to harm whoever verifies or opens them."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantline.files import sha256_json
from quantline.formats.bundle.manifest import MANIFEST, files_of_bundle
from quantline.report.verification import verify_bundle
from tests.attacks.conftest import PRIVATE
from tests.helpers.attacks import HARMLESS, outcome


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle that is as its manifest says."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"weights")
    describe(folder)
    return folder


def describe(folder: Path, **changes: Any) -> None:
    """Write a manifest that fits the files, with changes."""
    files = files_of_bundle(folder) | changes.pop("files", {})
    hashes = {name: entry["sha256"] for name, entry in files.items()}
    manifest = {"variant": "v", "files": files, "artifact_sha256": sha256_json(hashes)}
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


ENTRY = {"sha256": "0" * 64, "bytes": 1}


def named(name: str) -> Callable[[Path], None]:
    return lambda folder: describe(folder, files={name: ENTRY})


def manifest_text(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / MANIFEST).write_text(text) and None


def link_out(folder: Path) -> None:
    (folder / "extra.txt").symlink_to("../outside/private.txt")


def link_folder_out(folder: Path) -> None:
    (folder / "more").symlink_to("../outside")


def link_in_a_circle(folder: Path) -> None:
    (folder / "more").symlink_to("more")


def pipe(folder: Path) -> None:
    (folder / "model.gguf").unlink()
    os.mkfifo(folder / "model.gguf")


def manifest_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


MANIFESTS = {
    "a file outside": named("../outside/private.txt"),
    "a file of the root": named("/etc/passwd"),
    "a file with a NUL": named("a\x00b"),
    "a file with control characters": named("\x1b[2J\u202e"),
    "a file of 10,000 letters": named("a" * 10_000),
    "files that are a list": lambda folder: describe(folder, **{"artifact_sha256": 7}),
    "a hash that is a number": lambda folder: describe(folder, files={"x": ENTRY | {"sha256": 7}}),
    "a size that is a text": lambda folder: describe(folder, files={"x": ENTRY | {"bytes": "1"}}),
    "a variant that is a table": lambda folder: describe(folder, variant={"a": "\x1b"}),
    "brackets 100,000 deep": manifest_text("[" * 100_000),
    "an integer of 10,000 digits": manifest_text('{"bytes": ' + "9" * 10_000 + "}"),
    "no text": manifest_text("\x00\x01"),
    "a list": manifest_text("[]"),
    "a link out beside the files": link_out,
    "a link to a folder outside": link_folder_out,
    "a link to itself": link_in_a_circle,
    "a pipe in place of the weights": pipe,
    "a lineage that is a list": lambda folder: (folder / "lineage.json").write_text("[]") and None,
    "a lineage of numbers": lambda folder: (
        (folder / "lineage.json").write_text('{"contents": 7}') and None
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_verify_takes_no_harm_from(name, bundle):
    assert outcome(lambda: verify_bundle(bundle)) == HARMLESS
    MANIFESTS[name](bundle)
    said = []

    def verify() -> None:
        try:
            said.append(verify_bundle(bundle))
        except Exception as error:
            said.append(str(error))
            raise

    found = outcome(verify)
    assert PRIVATE not in said[0]
    # Links that lead nowhere and variants of any name change no byte of the bundle.
    harmless = ("a link to a folder outside", "a link to itself", "a variant that is a table")
    assert (found == HARMLESS) is (name in harmless)


def external(location: str) -> bytes:
    """Return an ONNX graph whose weight lies in another file."""
    import onnx
    from onnx import TensorProto, helper

    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        entry = weight.external_data.add()
        entry.key = key
        entry.value = value
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["w"], ["y"])
    graph = helper.make_graph([node], "g", [], [output], initializer=[weight])
    return onnx.helper.make_model(graph).SerializeToString()


GRAPHS = {
    "data outside": external("../outside/private.txt"),
    "data of the root": external("/etc/passwd"),
    "data through a link": external("link"),
    "data of a NUL": external("a\x00b"),
    "no graph": b"\xff" * 64,
    "nothing": b"",
}


@pytest.mark.parametrize("name", GRAPHS)
def test_onnxruntime_reads_nothing_from(name, bundle, plain_tokenizer):
    from quantline.runtimes.runtime import open_runtime

    shutil.copy(plain_tokenizer, bundle)
    (bundle / "model.onnx").write_bytes(GRAPHS[name])
    (bundle / "link").symlink_to("../outside/private.txt")
    assert outcome(lambda: open_runtime("onnxruntime", bundle, 1)) == "runtime_crashed"


@pytest.fixture
def plain_tokenizer(tiny_narrow) -> Path:
    return tiny_narrow / "tokenizer.json"


def gguf_file(tensors: int, fields: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor_info(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dims)
    return text(b"a") + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


GGUF = {
    "2**60 tensors": gguf_file(2**60, 0),
    "2**60 fields": gguf_file(0, 2**60),
    "a name of 2**60 letters": gguf_file(0, 1, text(b"x", 2**60)),
    "an array of 2**60": gguf_file(0, 1, text(b"x") + struct.pack("<IIQ", 9, 8, 2**60)),
    "a field of a type that does not exist": gguf_file(0, 1, text(b"x") + struct.pack("<I", 99)),
    "a tensor of 2**32 dimensions": gguf_file(1, 0, text(b"a") + struct.pack("<I", 2**32 - 1)),
    "a tensor that overflows": gguf_file(1, 0, tensor_info([2**40, 2**40])),
    "an offset behind the end": gguf_file(1, 0, tensor_info([32], offset=2**50)),
    "a tensor of a type that does not exist": gguf_file(1, 0, tensor_info([32], kind=999)),
    "version 99": gguf_file(0, 0, version=99),
    "no magic": b"EVIL" + bytes(64),
    "nothing": b"",
    "half a header": b"GGUF\x03",
}


QUICK = ("2**60 tensors", "an array of 2**60", "a tensor that overflows", "nothing")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GGUF],
)
def test_llama_cpp_refuses_a_file_with(name, bundle):
    """In the process of its own in which bundles are measured, with its limits."""
    from quantline.config.texts import Limits
    from quantline.run.child_process import call_in_child

    (bundle / "model.gguf").write_bytes(GGUF[name])
    arguments = {
        "bundle": str(bundle), "runtime": "llama.cpp", "reference": str(bundle),
        "speed": {"prompt_tokens": 1, "new_tokens": 1, "repetitions": 1, "threads": 1},
    }  # fmt: skip
    limits = Limits(seconds=120, memory_mib=2000)
    function = "quantline.metrics.measure:measure_bundle"
    found = outcome(lambda: call_in_child(function, arguments, limits, "the measuring process"))
    assert found in ("runtime_crashed", "out_of_memory")


@pytest.mark.parametrize("name", GGUF)
def test_gguf_checkpoint_refuses_a_converted_file_with(name, checkpoint):
    from quantline.model.gguf_checkpoint import FILE, GgufCheckpoint, conversion_folder

    conversion_folder(checkpoint).mkdir()
    (conversion_folder(checkpoint) / FILE).write_bytes(GGUF[name])
    assert outcome(lambda: GgufCheckpoint(checkpoint)) != HARMLESS
