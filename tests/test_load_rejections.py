"""Every checkpoint that load refuses: the failure's name, the words, the event, the exit code, and no output left."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from quantline.model.families import FAMILIES
from quantline.model.checkpoint import INDEX, Checkpoint
from quantline.model.safetensors_writer import SafetensorsStream


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    """Write the weights again; `change(name, tensor)` gives the new tensor, or None to leave it out."""
    base = Checkpoint(folder)
    tensors = {name: change(name, base.raw(name).copy()) for name in base.names}
    with SafetensorsStream(folder / "model.safetensors", base.names) as stream:
        for name, tensor in tensors.items():
            if tensor is not None:
                stream.add(name, tensor)


def point_index_at(folder: Path, file: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(Checkpoint(folder).names, file)}))


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def spoil(value):
    def change(name, tensor):
        if name.endswith("layers.1.mlp.up_proj.weight"):
            tensor[3, 5] = value
        return tensor

    return lambda folder: rewrite(folder, change)


def link_out(folder):
    outside = folder.parent / "secret.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    (folder / "model.safetensors").symlink_to(outside)


def link_template_out(folder):
    (folder.parent / "secret").write_text("a key")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to(folder.parent / "secret")


def cut_short(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def untie_head(folder):
    """Store a head of its own in a checkpoint whose configuration ties it."""
    base = Checkpoint(folder)
    tensors = {name: base.raw(name).copy() for name in base.names}
    with SafetensorsStream(folder / "model.safetensors", [*base.names, "lm_head.weight"]) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)
        stream.add("lm_head.weight", -tensors["model.embed_tokens.weight"])


def shift_tokens(folder):
    edit_json(folder / "config.json", vocab_size=300)
    rewrite(folder, lambda name, tensor: tensor[:300] if "embed" in name else tensor)


CASES = {
    "pickle": (only_pickle, "unsafe_checkpoint", "expected safetensors"),
    "custom-code": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "evil.Model"}),
                    "custom_code", "auto_map"),
    "custom-tokenizer": (lambda f: edit_json(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}),
                         "custom_code", "tokenizer_config.json"),
    "no-config": (lambda f: (f / "config.json").unlink(), "missing_file", "config.json"),
    "broken-config": (lambda f: (f / "config.json").write_text("{"), "missing_file", "JSON object"),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "missing_shard", "found neither"),
    "missing-shard": (lambda f: point_index_at(f, "model-00001-of-00002.safetensors"), "missing_shard",
                      "model-00001-of-00002.safetensors"),
    "empty-index": (lambda f: (f / INDEX).write_text("{}"), "missing_shard", "weight_map"),
    "cut-short": (cut_short, "missing_shard", "cut short"),
    "missing-tensor": (lambda f: rewrite(f, lambda n, t: None if n == "model.norm.weight" else t),
                       "missing_shard", "model.norm.weight"),
    "no-tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "missing_tokenizer", "tokenizer.json"),
    "broken-tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "missing_tokenizer", "tokenizer.json"),
    "wrong-tokenizer": (shift_tokens, "tokenizer_mismatch", "300 rows"),
    "nan": (spoil(np.nan), "non_finite", "model.layers.1.mlp.up_proj.weight"),
    "infinity": (spoil(-np.inf), "non_finite", "model.layers.1.mlp.up_proj.weight"),
    "index-climbs-out": (lambda f: point_index_at(f, "../model.safetensors"), "path_escape", "../model.safetensors"),
    "index-absolute": (lambda f: point_index_at(f, "/etc/passwd"), "path_escape", "/etc/passwd"),
    "weights-linked-out": (link_out, "path_escape", "found a link"),
    "template-linked-out": (link_template_out, "path_escape", "chat_template.jinja"),
    "not-causal": (lambda f: edit_json(f / "config.json", architectures=["BertForMaskedLM"], model_type="bert"),
                   "unsupported_architecture", "fill-mask"),
    "classifier": (lambda f: edit_json(f / "config.json", architectures=["LlamaForSequenceClassification"]),
                   "unsupported_architecture", "text-classification"),
    "unknown-class": (lambda f: edit_json(f / "config.json", architectures=["Nonsense"]),
                      "unsupported_architecture", "Nonsense"),
    "other-family": (lambda f: edit_json(f / "config.json", architectures=["BloomForCausalLM"], model_type="bloom"),
                     "unsupported_architecture", ", ".join(FAMILIES)),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
                  "unsupported_architecture", "gptq"),
    "wrong-shape": (lambda f: edit_json(f / "config.json", intermediate_size=600),
                    "unsupported_architecture", "(256, 600)"),
    "strange-tensor": (lambda f: edit_json(f / "config.json", num_hidden_layers=1),
                       "unsupported_architecture", "model.layers.1."),
    "head-untied": (untie_head, "unsupported_architecture", "tie_word_embeddings"),
    "integers": (lambda f: rewrite(f, lambda n, t: t.astype(np.int32) if n == "model.norm.weight" else t),
                 "unsupported_architecture", "I32"),
}


@pytest.mark.parametrize("case", CASES)
def test_load_refuses(case, project, tiny_model, tmp_path, capsys):
    break_it, failure, words = CASES[case]
    source = tmp_path / "broken"
    shutil.copytree(tiny_model, source)
    break_it(source)
    project.compose(f"model.path={source}")
    with pytest.raises(SystemExit) as stop:
        project.stage("load")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"load: load_rejected ({failure}): " in error and words in error
    last = project.events()[-1]
    assert last["severity"] == "error" and last["reason_code"] == "load_rejected"
    assert last["payload"]["failure"] == failure and words in last["summary"]
    artifacts = project.root / "artifacts"
    assert not artifacts.exists() or list(artifacts.iterdir()) == []


def test_a_refused_model_leaves_the_one_before(project, tiny_model, tmp_path):
    project.stage("load")
    before = sorted((project.root / "artifacts/model").iterdir())
    source = tmp_path / "broken"
    shutil.copytree(tiny_model, source)
    (source / "tokenizer.json").write_text("{}")
    project.compose(f"model.path={source}")
    with pytest.raises(SystemExit):
        project.stage("load")
    assert sorted((project.root / "artifacts/model").iterdir()) == before
    assert [path.name for path in (project.root / "artifacts").iterdir()] == ["model"]


def test_the_command_exits_with_1_and_a_plain_message(project, tmp_path):
    project.compose(f"model.path={tmp_path / 'nowhere'}")
    done = project.command("load")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "load: load_rejected (missing_file): expected a Hugging Face folder with config.json" in done.stderr
