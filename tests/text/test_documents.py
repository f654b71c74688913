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
    cut_text,
    misnamed,
    pin_revision,
    plain_text,
    read_documents,
    sha256_documents,
)

CHAT = [{"role": "user", "content": "who?"}]


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
        '{"text": "half \\ud83d of a pair"}',
        '{"text": "a \\u0000 in it"}',
        '{"messages": [{"role": "user", "content": "half \\ud83d"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        "[" * 100_000,
        "[]",
    ],
)
def test_read_documents_names_a_bad_line_by_its_number(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(StageError, match=r"a\.jsonl.*line 2") as error:
        read_documents(text_of(tmp_path / "a.jsonl"))
    assert error.value.failure == Failure.DATASET_INVALID


def test_read_documents_names_all_bad_lines_at_once(tmp_path):
    lines = ['{"text": "good"}', *["{}"] * 30]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(StageError, match=r"30 that are bad:") as error:
        read_documents(text_of(tmp_path / "a.jsonl"))
    assert "line 2: no 'text' among its keys" in str(error.value)
    assert "and 20 more" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "found 0"),
        (b"\n \n\t\n", "found 0"),
        (b"one\n\ncaf\xe9", "0xe9 in line 3"),
        (b"one\r\rcaf\xe9", "0xe9 in line 3"),
        ("one\n\ntwo".encode("utf-16"), "UTF-16"),
        ("one\n\ntwo".encode("utf-32"), "UTF-32"),
        ("one\n\ntwo".encode("utf-16-le"), "NUL character in line 1"),
        (b"one\n\ntw\0o", "NUL character in line 3"),
        (b"one\n\n\xed\xa0\xbd", "0xed in line 3"),  # half of a pair, as some programs write it
        (b"\x1f\x8b\x08 packed", "gzip"),
        (b"PAR1 columns", "Parquet"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_read_documents_refuses_what_is_no_text(content, words, suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StageError, match=words) as error:
        read_documents(text_of(path))
    assert error.value.failure == Failure.DATASET_INVALID
    assert str(path) in str(error.value)


def test_read_documents_says_what_it_takes_instead_of_a_folder_or_a_table(tmp_path):
    with pytest.raises(StageError, match="found a folder; join its files"):
        read_documents(text_of(tmp_path))
    (tmp_path / "a.CSV").write_text("text\none\n")
    with pytest.raises(StageError, match="write the column with the text as JSON lines"):
        read_documents(text_of(tmp_path / "a.CSV"))


PARAGRAPHS = ["one\nstill one", "two", "drei: ä", "four"]
ROWS = [{"text": paragraph} for paragraph in PARAGRAPHS]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\n\n".join(PARAGRAPHS).encode()),
        ("a.md", "\n\n".join(PARAGRAPHS).encode()),
        ("a.txt", b"\xef\xbb\xbf" + "\n\n".join(PARAGRAPHS).encode()),
        ("a.txt", "\n\n".join(PARAGRAPHS).replace("\n", "\r\n").encode()),
        ("a.txt", "\n\n".join(PARAGRAPHS).replace("\n", "\r").encode()),
        ("a.txt", (" \n \t\n \n" + " \n \n ".join(PARAGRAPHS) + " \n \n").encode()),
        ("a.txt", "\n\n\ufeff".join(PARAGRAPHS).encode()),  # files with marks, joined
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)).encode()),
        ("a.NDJSON", "\n".join(map(json.dumps, ROWS)).encode()),
        ("a.json", "\n".join(map(json.dumps, ROWS)).encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + "\n".join(map(json.dumps, ROWS)).encode()),
        ("a.jsonl", "\r\n".join(map(json.dumps, ROWS)).encode() + b"\r\n\r\n"),
        ("a.jsonl", "\n \n\n".join(map(json.dumps, ROWS)).encode()),
    ],
)
def test_read_documents_takes_files_as_other_tools_write_them(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_documents(text_of(tmp_path / name)) == PARAGRAPHS


def test_read_documents_of_json_lines_takes_the_key_that_is_named(tmp_path):
    rows = [{"body": "one", "text": "no", "messages": CHAT}, {"body": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_documents(text_of(tmp_path / "a.jsonl", column="body")) == ["one", "two"]
    with pytest.raises(StageError, match=r"line 2: no 'text' among its keys \(body\)"):
        read_documents(text_of(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("separator", ["\n", " "])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_read_documents_divides_a_text_that_is_one_document(separator, name, tmp_path):
    words = separator.join(f"sentence {number} of the text." for number in range(800))
    content = words if name == "a.txt" else json.dumps({"text": words})
    (tmp_path / name).write_text(content)
    first = read_documents(text_of(tmp_path / name, part=(0, 0.5)))
    second = read_documents(text_of(tmp_path / name, part=(0.5, 1)))
    assert separator.join([plain_text(document) for document in first + second]) == words
    assert len(first) > 1 and len(second) > 1


def test_cut_text_ends_pieces_at_blank_lines_then_line_ends_then_spaces():
    assert list(cut_text("a b c\n\nd e\nf g h i", 10)) == ["a b c", "d e", "f g h i"]
    assert list(cut_text("abc def ghi", 8)) == ["abc def", "ghi"]
    assert list(cut_text("abcdefghij", 4)) == ["abcd", "efgh", "ij"]
    assert list(cut_text(" " * 10 + "a", 4)) == ["a"]
    assert list(cut_text("short", 8)) == ["short"]


def test_read_documents_cuts_one_that_is_giant_beside_others(tmp_path, monkeypatch):
    monkeypatch.setattr("quantline.text.documents.LONGEST", 100)
    (tmp_path / "a.txt").write_text("short\n\n" + "word " * 100)
    documents = [plain_text(document) for document in read_documents(text_of(tmp_path / "a.txt"))]
    assert documents[0] == "short"
    assert len(documents) == 7
    assert max(map(len, documents)) <= 100


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


def test_read_documents_leaves_out_empty_lines_of_json(tmp_path):
    """Of many, nothing but what parts documents would be left."""
    rows = [{"text": ""}, {"text": " \n"}, {"text": "a"}, {"text": "b"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_documents(text_of(path)) == ["a", "b"]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": ""}]}))
    with pytest.raises(StageError, match="found 0"):
        read_documents(text_of(path))


def test_misnamed_says_that_plain_text_is_json_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert "call it a.jsonl" in str(misnamed(text_of(path)))
    path.write_text('{"text": "a"} is an object\n')
    assert misnamed(text_of(path)) is None
    path.write_text("7\n")
    assert misnamed(text_of(path)) is None
