"""Checkpoints that were made to harm whoever loads them."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantline.config.params import Model
from quantline.ingest.load import load
from quantline.model.checkpoint_files import INDEX, SINGLE
from tests.attacks.conftest import PRIVATE
from tests.helpers.attacks import HARMLESS, outcome, safetensors_file

CODE = "import os, pathlib; pathlib.Path(os.environ['MARK']).touch()"


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE,)


def tensor(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def weights(header: bytes | dict[str, Any], data: bytes = b"", size: int = -1) -> Callable:
    """Return what puts such a file in the place of the weights."""

    def attack(folder: Path) -> None:
        (folder / SINGLE).write_bytes(safetensors_file(header, data, size))

    return attack


DATA = bytes(16)
NAME = "model.norm.weight"
HEADERS = {
    "a header of 2**60 bytes": weights(b"{}", size=2**60),
    "a header of 2**64 - 1 bytes": weights(b"{}", size=2**64 - 1),
    "a header longer than the file": weights(b"{}", size=99),
    "no header": weights(b"", size=0),
    "a header that is no text": weights(b"\xff\xfe\x00\x80"),
    "a header that is a list": weights(b"[]"),
    "a header of blanks": weights(b" " * 64),
    "overlapping tensors": weights({NAME: tensor([4], 0, 16), "b": tensor([4], 0, 16)}, DATA),
    "a hole between tensors": weights({NAME: tensor([1], 0, 4), "b": tensor([1], 12, 16)}, DATA),
    "offsets behind the end": weights({NAME: tensor([4], 0, 1 << 40)}, DATA),
    "offsets in the wrong order": weights({NAME: tensor([4], 16, 0)}, DATA),
    "negative offsets": weights({NAME: tensor([4], -16, 0)}, DATA),
    "offsets that are texts": weights({NAME: tensor([4], "0", "16")}, DATA),
    "offsets of 400 digits": weights({NAME: tensor([4], 0, 10**400)}, DATA),
    "a negative shape": weights({NAME: tensor([-4], 0, 16)}, DATA),
    "a shape whose product overflows": weights({NAME: tensor([2**33, 2**33], 0, 16)}, DATA),
    "a shape of a million dimensions": weights({NAME: tensor([1] * 1_000_000, 0, 4)}, DATA[:4]),
    "a shape of a fraction": weights({NAME: tensor([1.5], 0, 16)}, DATA),
    "a type that does not exist": weights({NAME: tensor([4], 0, 16, "F99")}, DATA),
    "a type that is a table": weights({NAME: tensor([4], 0, 16, {"a": 1})}, DATA),
    "integers in place of weights": weights({NAME: tensor([4], 0, 16, "I32")}, DATA),
    "one name twice": weights(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
        DATA,
    ),
    "brackets 100,000 deep": weights(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata that is a number": weights({"__metadata__": 3, NAME: tensor([4], 0, 16)}, DATA),
    "a name of a megabyte": weights({"a" * 2**20: tensor([4], 0, 16)}, DATA),
    "a name with control characters": weights({"\x1b[2J\u202e": tensor([4], 0, 16)}, DATA),
    "a name with a path": weights({"../../x": tensor([4], 0, 16)}, DATA),
}


def index(value: Any) -> Callable:
    """Return what replaces the single file by an index."""

    def attack(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "model-1.safetensors")
        (folder / INDEX).write_text(value if isinstance(value, str) else json.dumps(value))

    return attack


def outside_of(folder: Path) -> Path:
    return folder.parent / "outside" / "private.txt"


def link_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(outside_of(folder))


def link_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(outside_of(folder))


def link_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").symlink_to("../outside/private.txt")


def link_configuration(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def link_in_a_circle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)


def pipe(folder: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def pickle_alone(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def pickle_renamed(folder: Path) -> None:
    (folder / SINGLE).write_bytes(pickle.dumps(Payload()))


def pickle_beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload()))


def code_beside(folder: Path) -> None:
    for name in ("modeling_llama.py", "configuration_llama.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(CODE)


FILES = {
    "an index that leads up": index({"weight_map": {NAME: "../outside/private.txt"}}),
    "an index that leads to the root": index({"weight_map": {NAME: "/etc/passwd"}}),
    "an index with a backslash": index({"weight_map": {NAME: "..\\outside"}}),
    "an index with a number": index({"weight_map": {NAME: 7}}),
    "an index with a table": index({"weight_map": {NAME: {"a": 1}}}),
    "an index of nothing": index({"weight_map": {}}),
    "an index that is a list": index({"weight_map": [1]}),
    "an index that names itself": index({"weight_map": {NAME: INDEX}}),
    "an index that is a folder's": index({"weight_map": {NAME: "."}}),
    "an index 100,000 deep": index('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "an index of a NUL": index({"weight_map": {NAME: "a\x00b"}}),
    "an index with a name of 10,000 letters": index({"weight_map": {NAME: "a" * 10_000}}),
    "weights that are a link out": link_weights,
    "a tokenizer that is a link out": link_tokenizer,
    "a template that is a link out": link_template,
    "a configuration that is a link out": link_configuration,
    "weights that are a link to themselves": link_in_a_circle,
    "weights that are a pipe": pipe,
    "a pickle alone": pickle_alone,
    "a pickle called safetensors": pickle_renamed,
    "pickles beside the weights": pickle_beside,
    "code beside the weights": code_beside,
}


def configuration(**changes: Any) -> Callable:
    def attack(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return attack


def configuration_text(text: str) -> Callable:
    def attack(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return attack


CONFIGURATIONS = {
    "code of its own": configuration(auto_map={"AutoModelForCausalLM": "modeling.Evil"}),
    "code of another repository": configuration(auto_map={"AutoConfig": "evil/repo--x.Y"}),
    "a class that is no model": configuration(architectures=["os.system"]),
    "a class of transformers that is no model": configuration(architectures=["Trainer"]),
    "a class with a path": configuration(architectures=["../../x"]),
    "an architecture that is a number": configuration(architectures=[7]),
    "architectures that are a text": configuration(architectures="LlamaForCausalLM"),
    "attention from a hub": configuration(_attn_implementation="evil/kernel"),
    "attention from a hub, by its other name": configuration(attn_implementation="evil/kernel"),
    "experts from a hub": configuration(_experts_implementation="evil/kernel"),
    "a type with control characters": configuration(model_type="\x1b[2Jllama\u202e"),
    "a type that is a list": configuration(model_type=["llama"]),
    "10**9 layers": configuration(num_hidden_layers=10**9),
    "minus one layer": configuration(num_hidden_layers=-1),
    "no heads": configuration(num_attention_heads=0),
    "a width of 10**12": configuration(hidden_size=10**12),
    "a vocabulary of 10**12": configuration(vocab_size=10**12),
    "a width that is a text": configuration(hidden_size="64; rm -rf /"),
    "an epsilon of NaN": configuration(rms_norm_eps=float("nan")),
    "a rope of infinity": configuration(rope_theta=float("inf")),
    "a rope that is a text": configuration(rope_scaling="yarn"),
    "an activation that is code": configuration(hidden_act="__import__('os').system('x')"),
    "positions of -5": configuration(max_position_embeddings=-5),
    "a quantization that is a text": configuration(quantization_config="gptq"),
    "an integer of 10,000 digits": configuration_text('{"hidden_size": ' + "9" * 10_000 + "}"),
    "brackets 100,000 deep": configuration_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "a list": configuration_text("[]"),
    "no text": configuration_text(""),
    "half a character": configuration_text('{"model_type": "\\ud800"}'),
}


def load_attacked(attack: Callable[[Path], None], folder: Path) -> str:
    """Return the outcome of loading; what was loaded holds nothing from outside."""
    attack(folder)
    target = folder.parent / "loaded"
    target.mkdir()
    path = str(folder)
    model = Model(source="local", path=path, watch=path)
    paths = list(sys.path)
    found = outcome(lambda: load(model, target))
    assert sys.path == paths
    for file in target.rglob("*"):
        if file.is_file():
            assert PRIVATE.encode() not in file.read_bytes()
            assert file.suffix not in (".py", ".bin")
    return found


@pytest.mark.parametrize("name", HEADERS)
def test_load_refuses_a_header_with(name, checkpoint):
    assert load_attacked(HEADERS[name], checkpoint) != HARMLESS


@pytest.mark.parametrize("name", FILES)
def test_load_takes_no_harm_from(name, checkpoint):
    harmless = name in ("pickles beside the weights", "code beside the weights")
    assert (load_attacked(FILES[name], checkpoint) == HARMLESS) is harmless


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_load_takes_no_harm_from_a_configuration_with(name, checkpoint):
    load_attacked(CONFIGURATIONS[name], checkpoint)
