"""Documents of files and Hub datasets, their parts, and the check that texts share none."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from quantline.config.texts import Text
from quantline.errors import Failure, StageError
from quantline.text.documents import (
    Document,
    check_disjoint,
    pin_revision,
    plain_text,
    read_documents,
    sha256_documents,
)

CHAT = [{"role": "user", "content": "who?"}]
LONG = "a paragraph that is long enough to be no accident, " * 3
PROMPT = "is this prompt anywhere?"


def text_of(path: Path, **changes) -> Text:
    options = {"source": "file", "path": str(path), "sequences": 4, "length": 16}
    return Text(**options | {"watch": str(path)} | changes)


def test_read_documents_parts_plain_text_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\nstill one\r\n\r\ntwo\n\n\n\nthree\n")
    documents = read_documents(text_of(tmp_path / "a.txt"))
    assert documents == ["one\nstill one", "two", "three"]


def test_read_documents_cuts_parts_that_cover_the_text_without_overlap(tmp_path):
    expected = [f"document {index}" for index in range(17)]
    (tmp_path / "a.txt").write_text("\n\n".join(expected))
    documents: list[Document] = []
    for first, last in pairwise([0, 0.1, 0.5, 0.73, 1]):
        documents += read_documents(text_of(tmp_path / "a.txt", part=(first, last)))
    assert documents == expected


def test_read_documents_takes_text_or_messages_from_json_lines(tmp_path):
    chat = [*CHAT, {"role": "assistant", "content": "ada\u2028hugo"}]
    rows = [{"text": "plain"}, {"messages": chat}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    documents = read_documents(text_of(tmp_path / "a.jsonl"))
    assert documents == ["plain", chat]
    assert plain_text(documents[1]) == "who?\nada\u2028hugo"
    assert sha256_documents(documents) != sha256_documents(documents[:1])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "{}",
        '{"text": 3}',
        '{"messages": []}',
        '{"messages": [{"role": "user"}]}',
        "",
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "[]",
    ],
)
def test_read_documents_names_a_bad_line_by_its_number(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(StageError, match="line 2") as error:
        read_documents(text_of(tmp_path / "a.jsonl"))
    assert error.value.failure == Failure.DATASET_INVALID


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe\xfa"])
def test_read_documents_refuses_what_is_no_text(content, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(StageError) as error:
        read_documents(text_of(tmp_path / "a.txt"))
    assert error.value.failure == Failure.DATASET_INVALID


@pytest.mark.parametrize(
    ("calibration", "evaluation", "words"),
    [
        ([LONG, "x"], ["y", LONG], "share no document"),
        ([f"so it asks: {PROMPT} Yes."], ["y"], "calibration text"),
        (["x"], [f"so it asks: {PROMPT} Yes."], "evaluation text"),
        ([[{"role": "user", "content": LONG}]], [LONG], "share no document"),
    ],
)
def test_check_disjoint_refuses_overlap(calibration, evaluation, words):
    with pytest.raises(StageError, match=words) as error:
        check_disjoint(calibration, evaluation, {"g-1": PROMPT})
    assert error.value.failure == Failure.TEXTS_OVERLAP


def test_check_disjoint_takes_short_coincidences():
    check_disjoint(["Yes.", LONG], ["Yes.", LONG + "!"], {"g-1": "Yes."})


def hub_text(**changes) -> Text:
    options = {
        "source": "hub",
        "dataset": "owner/stories",
        "dataset_config": "plain",
        "split": "test",
        "dataset_revision": "c0ffee",
        "sequences": 4,
        "length": 16,
        "watch": "conf",
    }
    return Text(**options | changes)


@pytest.fixture
def hub(monkeypatch) -> Callable[[dict], list[tuple]]:
    """hub(rows): the datasets library gives these rows; the requests to it are returned."""
    import datasets

    def serve(rows: dict) -> list[tuple]:
        requests = []

        def load_dataset(*names, **options):
            requests.append((names, options))
            return datasets.Dataset.from_dict(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return requests

    return serve


def test_read_documents_requests_a_hub_dataset_at_its_commit_and_takes_its_column(hub):
    requests = hub({"story": ["one", "", "  ", "two"], "other": [1, 2, 3, 4]})
    assert read_documents(hub_text(column="story")) == ["one", "two"]
    assert requests == [(("owner/stories", "plain"), {"split": "test", "revision": "c0ffee"})]


def test_read_documents_prefers_the_chats_of_a_hub_dataset_to_its_text(hub):
    hub({"messages": [CHAT], "text": ["plain"]})
    assert read_documents(hub_text()) == [CHAT]


def test_read_documents_lists_the_columns_that_a_hub_dataset_has(hub):
    hub({"story": ["one"]})
    with pytest.raises(StageError, match="has the columns story, not 'text'; set column") as error:
        read_documents(hub_text())
    assert error.value.failure == Failure.DATASET_INVALID


def test_read_documents_names_a_hub_that_does_not_answer(monkeypatch):
    import datasets

    def load_dataset(*names, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(StageError, match="no route") as error:
        read_documents(hub_text())
    assert error.value.failure == Failure.NETWORK_UNAVAILABLE


def test_pin_revision_leaves_files_and_an_offline_hub_alone(tmp_path):
    text = text_of(tmp_path / "a.txt")
    assert pin_revision(text) is text
    assert pin_revision(hub_text()).dataset_revision == "c0ffee"


def test_pin_revision_replaces_a_branch_by_its_commit(monkeypatch):
    import huggingface_hub

    class Api:
        """Stands in for the Hub's client."""

        def dataset_info(self, name, revision):
            assert (name, revision) == ("owner/stories", "main")
            return type("Info", (), {"sha": "deadbeef"})

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert pin_revision(hub_text(dataset_revision="main")).dataset_revision == "deadbeef"
