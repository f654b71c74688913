"""Every checkpoint that load refuses.

Each has its failure's name, its words, its event and exit code, and leaves no output.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX
from tests.helpers.tensor_files import change_tensors, edit_json, read_tensors, write_tensors

WEIGHTS = "model.safetensors"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def edit_config(**changes) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def point_index_at(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        index = {"weight_map": dict.fromkeys(Checkpoint(folder).names, file)}
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def only_index(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
    """Take away the file that would count before an index."""

    def change(folder: Path) -> None:
        spoil(folder)
        (folder / WEIGHTS).unlink()

    return change


def wrap(prefix: str) -> Callable[[Path], None]:
    """Let all names begin as those of a model inside of another do."""

    def change(folder: Path) -> None:
        tensors = {f"{prefix}.{name}": tensor for name, tensor in read_tensors(folder).items()}
        write_tensors(folder / WEIGHTS, tensors)

    return change


def set_one_weight(value: float) -> Callable[[Path], None]:
    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        if name == UP_PROJ:
            tensor[3, 5] = value
        return tensor

    return lambda folder: change_tensors(folder, change)


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def use_tokenizer_code(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]})


def link_weights_out(folder: Path) -> None:
    outside = folder.parent / "secret.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


def link_template_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("a key")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to(folder.parent / "secret")


def cut_short(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


def drop_final_norm(folder: Path) -> None:
    change_tensors(folder, lambda name, tensor: None if name == NORM else tensor)


def make_integers(folder: Path) -> None:
    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        return tensor.astype(np.int32) if name == NORM else tensor

    change_tensors(folder, change)


def untie_head(folder: Path) -> None:
    """Store a head of its own in a checkpoint whose configuration ties it."""
    tensors = read_tensors(folder)
    head = {"lm_head.weight": -tensors["model.embed_tokens.weight"]}
    write_tensors(folder / WEIGHTS, tensors | head)


def shrink_vocabulary(folder: Path) -> None:
    """Leave the tokenizer with more tokens than the embedding has rows."""

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        return tensor[:300] if "embed" in name else tensor

    edit_json(folder / "config.json", vocab_size=300)
    change_tensors(folder, change)


ARCHITECTURE = "unsupported_architecture"
# What is wrong with the checkpoint → (what makes it so, the failure, words of the message).
CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "pickle": (only_pickle, "unsafe_checkpoint", "expected safetensors"),
    "custom-code": (
        edit_config(auto_map={"AutoModel": "evil.Model"}),
        "custom_code",
        "auto_map",
    ),
    "custom-tokenizer": (use_tokenizer_code, "custom_code", "tokenizer_config.json"),
    "no-config": (remove("config.json"), "missing_file", "config.json"),
    "broken-config": (write("config.json", "{"), "missing_file", "JSON object"),
    "no-weights": (remove(WEIGHTS), "missing_shard", "found neither"),
    "missing-shard": (
        only_index(point_index_at("model-00001-of-00002.safetensors")),
        "missing_shard",
        "model-00001-of-00002.safetensors",
    ),
    "empty-index": (only_index(write(INDEX, "{}")), "missing_shard", "weight_map"),
    "cut-short": (cut_short, "missing_shard", "cut short"),
    "missing-tensor": (drop_final_norm, "missing_shard", NORM),
    "no-tokenizer": (remove("tokenizer.json"), "missing_tokenizer", "tokenizer.json"),
    "broken-tokenizer": (write("tokenizer.json", "{}"), "missing_tokenizer", "tokenizer.json"),
    "wrong-tokenizer": (shrink_vocabulary, "tokenizer_mismatch", "300 rows"),
    "nan": (set_one_weight(np.nan), "non_finite", UP_PROJ),
    "infinity": (set_one_weight(-np.inf), "non_finite", UP_PROJ),
    "index-climbs-out": (
        point_index_at("../model.safetensors"),
        "path_escape",
        "../model.safetensors",
    ),
    "index-absolute": (point_index_at("/etc/passwd"), "path_escape", "/etc/passwd"),
    "weights-linked-out": (link_weights_out, "path_escape", "found a link"),
    "template-linked-out": (link_template_out, "path_escape", "chat_template.jinja"),
    "not-causal": (
        edit_config(architectures=["BertForMaskedLM"], model_type="bert"),
        ARCHITECTURE,
        "masked lm",
    ),
    "classifier": (
        edit_config(architectures=["LlamaForSequenceClassification"]),
        ARCHITECTURE,
        "sequence classification",
    ),
    "base-model": (
        edit_config(architectures=["LlamaModel"]),
        ARCHITECTURE,
        "without an output head",
    ),
    "unknown-class": (edit_config(architectures=["Nonsense"]), ARCHITECTURE, "Nonsense"),
    "other-family": (
        edit_config(architectures=["BloomForCausalLM"], model_type="bloom"),
        ARCHITECTURE,
        "found model.embed_tokens.weight",
    ),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        ARCHITECTURE,
        "gptq",
    ),
    "wrong-shape": (edit_config(intermediate_size=600), ARCHITECTURE, "(256, 600)"),
    "strange-tensor": (edit_config(num_hidden_layers=1), ARCHITECTURE, "model.layers.1."),
    "wrapped": (wrap("module"), ARCHITECTURE, "whose names begin with 'module'"),
    "wrapped twice": (wrap("base_model.model"), ARCHITECTURE, "save the inner model alone"),
    "head-untied": (untie_head, ARCHITECTURE, "tie_word_embeddings"),
    "integers": (make_integers, ARCHITECTURE, "I32"),
}


@pytest.mark.parametrize("case", CASES)
def test_load_refuses_a_checkpoint(case, project, tiny_model, tmp_path, capsys):
    spoil, failure, words = CASES[case]
    source = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    spoil(source)
    project.compose(f"model.path={source}")
    with pytest.raises(SystemExit) as stopped:
        project.stage("load")
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert f"load: load_rejected ({failure}): " in message
    assert words in message
    event = project.events()[-1]
    assert (event["severity"], event["reason_code"]) == ("error", "load_rejected")
    assert event["payload"]["failure"] == failure
    assert words in event["summary"]
    artifacts = project.root / "artifacts"
    assert not artifacts.exists() or list(artifacts.iterdir()) == []
