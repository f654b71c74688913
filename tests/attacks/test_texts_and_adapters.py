"""Texts, gold sets and adapters that were made to harm whoever reads them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantline.ingest.lora import CONFIG, WEIGHTS, merge
from quantline.metrics import scoring
from quantline.metrics.gold_items import load_gold
from quantline.metrics.gold_set import TokenizedItem
from quantline.model.checkpoint import Checkpoint
from quantline.run import bounded_call
from tests.helpers.attacks import HARMLESS, outcome, safetensors_file

ITEM = {"id": "a", "prompt": "2 + 2 =", "answer": "4"}


def item(**changes: Any) -> str:
    return json.dumps(ITEM | changes)


GOLD = {
    "a pattern that never ends": item(match="regex", answer="(a|aa)+$"),
    "a pattern of 10 MB": item(match="regex", answer="(a|b)" * 2_000_000),
    "a pattern of 10**9 repetitions": item(match="regex", answer="(a{9999}){9999}"),
    "a pattern 5,000 deep": item(match="regex", answer="(" * 5000 + "a" + ")" * 5000),
    "a pattern that is none": item(match="regex", answer="((("),
    "a task with a path": item(task="../../x"),
    "a task with control characters": item(task="\x1b[2J"),
    "a task of 10,000 letters": item(task="x" * 10_000),
    "a task that is a figure's name": item(task="accuracy_delta"),
    "an id that is a number": item(id=7),
    "an id that is a table": item(id={"$ne": 1}),
    "choices that are a text": item(choices="4"),
    "a million choices of one": item(choices=["4"] * 100_000),
    "10**12 tokens to write": item(max_tokens=10**400),
    "minus one token": item(max_tokens=-1),
    "an unknown key": item(__class__="x"),
    "messages of numbers": item(messages=[1, 2]),
    "a role that is a table": item(messages=[{"role": {}, "content": "x"}]),
    "half a character": '{"id": "\\ud800", "prompt": "x", "answer": "y"}',
    "brackets 100,000 deep": "[" * 100_000,
    "an integer of 10,000 digits": '{"id": ' + "9" * 10_000 + "}",
    "NaN": '{"id": NaN}',
    "a list": "[]",
    "a NUL": '{"id": "a\\u0000b", "prompt": "x", "answer": "y"}',
}


@pytest.mark.parametrize("name", GOLD)
def test_load_gold_takes_no_harm_from(name, tmp_path):
    path = tmp_path / "gold.jsonl"
    path.write_text(GOLD[name] + "\n")
    harmless = outcome(lambda: load_gold(path)) == HARMLESS
    # What its form allows is bounded where it is used.
    assert not harmless or name in (
        "a pattern that never ends",
        "10**12 tokens to write",
        "a million choices of one",
        "a NUL",
    )


def test_a_pattern_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(bounded_call, "SECONDS", 0.5)
    values = dict.fromkeys(("id", "task", "text", "reference"), "(a+)+$")
    question = TokenizedItem(**values, kind="generated", prompt=[], continuations=[], answer=0,
                             divisors=[], match="regex")  # fmt: skip
    question = replace(question, reference="(a|aa)+$")
    assert outcome(lambda: scoring._matches(question, "a" * 60 + "b")) == "timed_out"
    assert scoring._matches(question, "aaa")


NAME = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def adapter(names: tuple[str, str] | None = None, **changes: Any) -> Callable[[Path], None]:
    """Return what writes an adapter with such names of tensors and such a configuration."""
    down, up = names or (f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight")

    def write(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(PLAIN | changes))
        tensors = {down: np.ones((2, 64), np.float32), up: np.ones((64, 2), np.float32)}
        save_file(tensors, folder / WEIGHTS)

    return write


def link_out(folder: Path) -> None:
    adapter()(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("../outside/private.txt")


def link_configuration(folder: Path) -> None:
    adapter()(folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("../outside/private.txt")


def hostile_header(folder: Path) -> None:
    adapter()(folder)
    (folder / WEIGHTS).write_bytes(safetensors_file(b"{}", size=2**60))


def deep_configuration(folder: Path) -> None:
    adapter()(folder)
    (folder / CONFIG).write_text("[" * 100_000)


def pickle_alone(folder: Path) -> None:
    adapter()(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


ADAPTERS = {
    "names that lead up": adapter(("../../x.lora_A.weight", "../../x.lora_B.weight")),
    "names of classes": adapter(("__class__.lora_A.weight", "__class__.lora_B.weight")),
    "names with control characters": adapter(("\x1b[2J.lora_A.weight", "\x1b[2J.lora_B.weight")),
    "names of nothing": adapter((".lora_A.weight", ".lora_B.weight")),
    "a rank of 10**12": adapter(r=10**12),
    "a rank of zero": adapter(r=0),
    "a rank that is a text": adapter(r="2; rm"),
    "an alpha of NaN": adapter(lora_alpha=float("nan")),
    "an alpha that is a list": adapter(lora_alpha=[1]),
    "no alpha": adapter(lora_alpha=None),
    "a pattern that never ends": adapter(rank_pattern={"(.*.*)*x|(q|q)*$": 2}),
    "a pattern that is none": adapter(rank_pattern={"(((": 2}),
    "a pattern that is a list": adapter(rank_pattern=[1]),
    "a kind that runs code": adapter(auto_mapping={"base_model_class": "os.system"}),
    "another kind": adapter(peft_type="EVIL\x1b[2J"),
    "weights that are a link out": link_out,
    "a configuration that is a link out": link_configuration,
    "a header of 2**60 bytes": hostile_header,
    "a configuration 100,000 deep": deep_configuration,
    "a pickle alone": pickle_alone,
}
# What nobody reads, or a tensor's own shape decides, may be passed over.
ALLOWED = ("a kind that runs code", "a rank of 10**12", "a pattern that never ends")


@pytest.mark.parametrize("name", ADAPTERS)
def test_merge_takes_no_harm_from_an_adapter_with(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_call, "SECONDS", 0.5)
    folder = tmp_path / "adapter"
    folder.mkdir()
    ADAPTERS[name](folder)
    target = Path(shutil.copytree(checkpoint, tmp_path / "merged"))
    found = outcome(lambda: merge(Checkpoint(checkpoint), folder, target))
    assert found != HARMLESS or name in ALLOWED
