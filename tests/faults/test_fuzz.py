"""Every reader of a file that others may have written, on bytes that nobody meant.

Random bytes, damaged copies of a right file, and JSON with other values in its places give a value
or a named error, and never anything else. QUANTLINE_FUZZ is the number of examples for each reader
and kind (25 by default; `make test-all` takes many more):

    QUANTLINE_FUZZ=2000 python -m pytest -n 0 -s tests/faults/test_fuzz.py
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantline.config.compose import as_yaml, compose, load_params
from quantline.config.texts import Text
from quantline.errors import ConfigError, StageError
from quantline.formats.bundle.manifest import read_manifest
from quantline.formats.gguf.imatrix import (
    Entry,
    ImportanceMatrix,
    read_importance,
    write_importance,
)
from quantline.ingest.lora import CONFIG, WEIGHTS, Adapter
from quantline.ingest.verify import check_config
from quantline.metrics.gold_items import load_gold
from quantline.model.checkpoint import INDEX, Checkpoint, weight_map
from quantline.run.events import read_events
from quantline.run.lineage import read_lineage
from quantline.text.documents import read_documents
from quantline.text.tokenizer import Tokenizer
from tests.helpers.project import ROOT
from tests.helpers.tensor_files import write_tensors

EXAMPLES = int(os.environ.get("QUANTLINE_FUZZ", "25"))
MANY = int(os.environ.get("QUANTLINE_FUZZ", "1000"))
EXECUTIONS: Counter[str] = Counter()
DEEP = b"[" * 100_000
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


class Reader:
    """A reader, and a right file for it.

    Attributes:
        path: Of the file.
        right: Its bytes.
        read: Reads it.
    """

    def __init__(self, path: Path, right: bytes, read: Callable[[], Any]) -> None:
        self.path = path
        self.right = right
        self.read = read

    def gives_a_value_or_a_named_error(self, content: bytes) -> None:
        EXECUTIONS[self.path.name] += 1
        self.path.write_bytes(content)
        try:
            self.read()
        except (StageError, ConfigError) as error:
            assert str(error).strip()


def texts(path: Path) -> Callable[[], Any]:
    text = Text(source="file", path=str(path), sequences=1, length=2, watch=str(path))
    return lambda: read_documents(text)


def lines(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


@pytest.fixture(scope="module")
def readers(tmp_path_factory, tiny_model) -> dict[str, Reader]:
    """Every reader by a name."""
    folder = tmp_path_factory.mktemp("fuzz")
    found: dict[str, Reader] = {}

    def add(name: str, file: str, right: bytes, read: Callable[[Path], Any]) -> None:
        path = folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(right)
        found[name] = Reader(path, right, lambda: read(path))

    def copied(
        name: str, file: str, read: Callable[[Path], Any], right: bytes | None = None
    ) -> None:
        inner = folder / name
        inner.mkdir()
        for source in tiny_model.iterdir():
            shutil.copy(source, inner)
        add(name, file, right or (inner / file).read_bytes(), read)

    item = {"id": "a", "prompt": "b", "answer": "c", "task": "t", "choices": ["c", "d"]}
    said = [{"role": "user", "content": "hi"}]
    chat = {"id": "x", "messages": said, "answer": "^a", "match": "regex"}
    add("gold set", "gold.jsonl", lines(item, chat), load_gold)
    row = {"text": "a text"}
    messages = {"messages": [*said, {"role": "assistant", "content": "a"}]}
    add("texts in lines", "texts.jsonl", lines(row, messages), lambda path: texts(path)())
    add("text", "text.txt", b"one\n\ntwo\r\n\r\nthree\n", lambda path: texts(path)())
    params = as_yaml(compose(["suite=quick"], root=ROOT)).encode()
    add("parameters", "params.yaml", params, load_params)
    manifest = {"variant": "a", "artifact_sha256": "0", "files": {"x": {"sha256": "0", "bytes": 1}}}
    as_json = json.dumps(manifest).encode()
    add("manifest", "manifest.json", as_json, lambda path: read_manifest(path.parent))
    lineage = {"params": {"a": 1}, "files": {}, "artifacts": {"m": "0"}, "contents": {}}
    as_json = json.dumps(lineage).encode()
    add("lineage", "artifacts/model/lineage.json", as_json, lambda path: read_lineage("model"))
    event = {
        "stage": "load",
        "severity": "info",
        "summary": "s",
        "reason_code": None,
        "payload": {"instance": None},
    }
    add("events", "events.jsonl", lines(event, event), read_events)
    weights = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    right = json.dumps(weights).encode()
    copied("index", INDEX, lambda path: weight_map(path.parent), right)
    copied("weights", "model.safetensors", lambda path: weight_map(path.parent))
    copied("configuration", "config.json", lambda path: check_config(path.parent))
    copied("tokenizer", "tokenizer.json", lambda path: Tokenizer(path.parent).encode("a text"))
    copied(
        "tokenizer's configuration",
        "tokenizer_config.json",
        lambda path: Tokenizer(path.parent).prompt("a text"),
    )
    name = "model.layers.0.self_attn.q_proj"
    base = Checkpoint(tiny_model)
    out, into = base.shape(f"{name}.weight")
    adapter = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {},
        "use_rslora": False,
    }

    def merged(path: Path) -> None:
        Adapter(path.parent, base).merged(f"{name}.weight", base.raw(f"{name}.weight"))

    add("adapter", CONFIG, json.dumps(adapter).encode(), merged)
    write_tensors(
        folder / "adapter" / WEIGHTS,
        {
            f"base_model.model.{name}.lora_A.weight": np.zeros((2, into), np.float32),
            f"base_model.model.{name}.lora_B.weight": np.zeros((out, 2), np.float32),
        },
    )
    matrix = ImportanceMatrix(
        {"blk.0.attn_q.weight": Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))},
        ("text",),
        1,
        16,
    )
    path = folder / "importance.gguf"
    write_importance(path, matrix, "llama")
    add("importance matrix", "imatrix.gguf", path.read_bytes(), read_importance)
    return found


NAMES = (
    "gold set",
    "texts in lines",
    "text",
    "parameters",
    "manifest",
    "lineage",
    "events",
    "index",
    "weights",
    "configuration",
    "tokenizer",
    "tokenizer's configuration",
    "adapter",
    "importance matrix",
)
IN_JSON = ("manifest", "lineage", "index", "configuration", "tokenizer's configuration", "adapter")
IN_LINES = ("gold set", "texts in lines", "events")


def bounded(count: int) -> Callable[[Any], Any]:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, suppress_health_check=checks)


@st.composite
def damaged(draw: Any, right: bytes) -> bytes:
    """A right file with some bytes changed, cut out, put in, or repeated."""
    data = bytearray(right)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "cut", "put in", "repeat", "end"]))
        if kind == "change" and data:
            data[start] = draw(st.integers(0, 255))
        elif kind == "cut":
            del data[start : start + draw(st.integers(1, 40))]
        elif kind == "put in":
            data[start:start] = draw(st.binary(max_size=8))
        elif kind == "repeat":
            data[start:start] = data[start : start + draw(st.integers(1, 200))]
        else:
            del data[start:]
    return bytes(data)


def replaced(value: Any, steps: list[int], other: Any) -> Any:
    """Return JSON in which one value, found along the steps, is another, or is gone."""
    if not steps or not isinstance(value, dict | list) or not value:
        return other
    step, *rest = steps
    if isinstance(value, list):
        place = step % len(value)
        return [*value[:place], replaced(value[place], rest, other), *value[place + 1 :]]
    name = sorted(value)[step % len(value)]
    if other == "gone" and not rest:
        return {key: inner for key, inner in value.items() if key != name}
    return value | {name: replaced(value[name], rest, other)}


def fuzz(readers: dict[str, Reader], name: str, count: int) -> None:
    """Give a reader all kinds of bytes."""
    reader = readers[name]
    check = reader.gives_a_value_or_a_named_error
    for content in (b"", b"\n", b"null", b"{}", b"[]", b"0", b"\xff\xfe", DEEP, b"{" * 50_000):
        check(content)
    bounded(count)(given(st.binary(max_size=300))(check))()
    bounded(count)(given(damaged(reader.right))(check))()
    steps = st.lists(st.integers(0, 50), max_size=4)
    if name in IN_JSON:

        @bounded(count)
        @given(steps, VALUES | st.just("gone"))
        def other_values(where: list[int], other: Any) -> None:
            value = replaced(json.loads(reader.right), where, other)
            check(json.dumps(value).encode("utf-8", "surrogatepass"))

        other_values()
    if name in IN_LINES:

        @bounded(count)
        @given(st.lists(st.tuples(st.integers(0, 1), steps, VALUES), min_size=1, max_size=3))
        def other_lines(changes: list[tuple[int, list[int], Any]]) -> None:
            rows = [json.loads(line) for line in reader.right.splitlines()]
            made = [replaced(rows[which % len(rows)], at, other) for which, at, other in changes]
            check(lines(*made))

        other_lines()


@pytest.fixture
def in_its_folder(readers, monkeypatch) -> None:
    """The lineage is found from the working folder."""
    monkeypatch.chdir(readers["lineage"].path.parents[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_gives_a_value_or_a_named_error(readers, name, in_its_folder):
    right = readers[name]
    right.path.write_bytes(right.right)
    right.read()
    fuzz(readers, name, EXAMPLES)
    right.path.write_bytes(right.right)


@pytest.mark.slow
def test_readers_give_a_value_or_a_named_error_many_times(readers, in_its_folder, capsys):
    for name in NAMES:
        fuzz(readers, name, MANY)
        readers[name].path.write_bytes(readers[name].right)
    with capsys.disabled():
        print(f"\nexecutions: {sum(EXECUTIONS.values())}: {dict(EXECUTIONS)}")
