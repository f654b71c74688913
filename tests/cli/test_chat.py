"""`quantline chat` and `quantline serve` on bundles of a tiny model."""

import json

import pytest

from quantline.cli import bundles
from quantline.errors import ConfigError, StageError
from quantline.runtimes import servers
from quantline.runtimes.chat import Chat
from tests.helpers.bundles import NONE, export, loaded_model, store_of
from tests.helpers.command_line import quantline
from tests.helpers.gguf import file_of

pytestmark = pytest.mark.xdist_group("chat")  # two bundles for all
OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model):
    """Name → folder of a GGUF bundle and of one in safetensors."""
    root = tmp_path_factory.mktemp("chat")
    model = loaded_model(root / "model", tiny_model)
    store = store_of(root / "store", model, NONE)
    export(root / "gguf", model, store, "gguf", dtype="float32")
    export(root / "plain", model, store, "safetensors")
    return {"gguf": root / "gguf", "plain": root / "plain"}


def test_chat_shows_two_variants_side_by_side(exported):
    answer = quantline(
        *("chat", str(exported["gguf"]), str(exported["plain"])),
        *("--prompt", "One day", "--max-tokens", "3"),
    )
    assert answer.exit_code == 0, answer.output
    assert "One day" in answer.output
    assert "gguf" in answer.output and "plain" in answer.output
    assert answer.output.count("tokens in") == 2


def test_ask_writes_chats_with_the_models_own_template(exported, monkeypatch):
    folder = exported["gguf"]
    chat = Chat(folder, json.loads((folder / "manifest.json").read_text()))
    asked = []
    whole = chat.engine.generate
    monkeypatch.setattr(
        chat.engine, "generate", lambda ids, *rest: asked.append(ids) or whole(ids, *rest)
    )
    first = chat.ask("One", 2)
    chat.ask("Two", 2)
    text = chat.engine.decode(asked[1])
    assert text.endswith(f"<|im_start|>user\nTwo<|im_end|>\n{OPENING}")
    assert f"<|im_start|>user\nOne<|im_end|>\n{OPENING}{first.text}<|im_end|>" in text
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_ask_ends_where_the_bundle_ends_a_text(exported, monkeypatch):
    asked = []
    for folder in exported.values():
        chat = Chat(folder, json.loads((folder / "manifest.json").read_text()))
        monkeypatch.setattr(
            chat.engine, "generate", lambda ids, most, ends: asked.append(ends) or []
        )
        chat.ask("One", 2)
    # The tokenizer's end; llama.cpp ends at <|im_end|> too, since it knows it by its text.
    assert asked == [{0, 2}, {0}]


def test_ask_continues_texts_where_there_is_no_template(exported):
    folder = exported["gguf"]
    chat = Chat(folder, json.loads((folder / "manifest.json").read_text()))
    chat.template = None
    assert chat.ask("One", 2).tokens <= 2
    assert chat.messages == []


def test_chat_refuses_a_bundle_that_was_changed(exported, tmp_path):
    import shutil

    copy = shutil.copytree(exported["gguf"], tmp_path / "copy")
    file_of(copy).write_bytes(b"GGUF")
    answer = quantline("chat", str(copy), "--prompt", "One")
    assert answer.exit_code == 1
    assert "artifact_changed" in answer.output


def test_chat_takes_no_more_than_two(exported):
    answer = quantline("chat", *[str(exported["gguf"])] * 3, "--prompt", "One")
    assert "expected one variant or two, found 3" in answer.output


def test_serve_becomes_the_runtimes_own_server(exported, monkeypatch):
    started = []
    monkeypatch.setattr(servers, "find_spec", lambda name: object())
    monkeypatch.setattr("os.execvp", lambda file, command: started.append((file, command)))
    answer = quantline("serve", str(exported["gguf"]), "--port", "8123", "--n_ctx", "64")
    assert answer.exit_code == 0, answer.output
    ((file, command),) = started
    assert command[0] == file
    assert command[1:3] == ["-m", "llama_cpp.server"]
    assert command[-4:] == ["--port", "8123", "--n_ctx", "64"]


def test_serve_says_what_is_missing(exported, monkeypatch):
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    answer = quantline("serve", str(exported["gguf"]))
    assert answer.exit_code == 1
    assert "runtime_unavailable" in answer.output
    assert "pip install 'quantline[serve]'" in answer.output


def test_find_bundle_knows_variants_of_the_project_alone(project):
    with pytest.raises(ConfigError, match=r"a variant among bf16, .*, found nothing"):
        bundles.find_bundle("nothing")
    with pytest.raises(StageError, match=r"found no manifest\.json; export it first"):
        bundles.find_bundle("bf16")
