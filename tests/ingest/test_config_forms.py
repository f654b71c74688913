"""Every form of config.json means what transformers takes it for, or is refused by its key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.configuration import (
    FILE,
    complete,
    read_configuration,
    transformers_config,
    write_configuration,
)
from quantline.model.output_head import OutputHead
from tests.helpers.models import transformers_model

Change = Callable[[dict[str, Any]], dict[str, Any]]


def put(**values: Any) -> Change:
    return lambda config: config | values


def drop(*keys: str) -> Change:
    return lambda config: {key: value for key, value in config.items() if key not in keys}


def old_rope(theta: float | None, **scaling: Any) -> Change:
    """Spell the rotary embedding as transformers 4 did."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        spelled = drop("rope_parameters")(config)
        if theta is not None:
            spelled["rope_theta"] = theta
        return spelled | {"rope_scaling": scaling or None}

    return change


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Form of config.json → what makes it so.
ACCEPTED: dict[str, Change] = {
    "as saved": put(),
    "no epsilon": drop("rms_norm_eps"),
    "no activation": drop("hidden_act"),
    "no positions": drop("max_position_embeddings"),
    "no class": drop("architectures"),
    "class null": put(architectures=None),
    "another class first": put(architectures=["NewForCausalLM", "LlamaForCausalLM"]),
    "no rotary embedding": drop("rope_parameters"),
    "head width null": put(head_dim=None),
    "quantization null": put(quantization_config=None),
    "old theta": old_rope(1e6),
    "old theta as an integer": old_rope(10000),
    "old linear": old_rope(1e4, type="linear", factor=2.0),
    "old llama3 with both types": old_rope(1e4, type="llama3", rope_type="llama3", **LLAMA3),
    "old types that contradict": old_rope(1e4, type="default", rope_type="linear", factor=2.0),
    "old yarn": old_rope(1e6, type="yarn", factor=4.0, original_max_position_embeddings=64),
    "dynamic": put(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "new and old theta": put(rope_theta=777.0),
    "new and old scaling": put(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "attention from the Hub": put(
        _attn_implementation="kernels-community/x", attn_implementation="a/b"
    ),
    "experts from the Hub": put(_experts_implementation="a/b", use_kernels=True),
    "many tokens seen": put(tokens_seen=2_000_000_000_000),
}


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory) -> Path:
    """A float32 Llama with a rotary base that is not the usual one. Read only."""
    import torch

    return make_model(
        tmp_path_factory.mktemp("forms") / "base",
        hidden_size=64,
        intermediate_size=96,
        dtype=torch.float32,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )


def changed(base: Path, folder: Path, change: Change | str) -> Path:
    """Copy a checkpoint and change its config.json, or write a text in its place."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder


@pytest.mark.parametrize("form", ACCEPTED)
def test_logits_are_those_of_transformers(form, base, tmp_path):
    import torch

    folder = changed(base, tmp_path / "model", ACCEPTED[form])
    verify.check_config(folder)
    checkpoint = Checkpoint(folder)
    tokens = np.random.default_rng(0).integers(3, 384, (2, 100)).astype(np.int32)
    hidden = final_hidden_states(checkpoint, tokens, "blocks")
    head = OutputHead.of(checkpoint).to_torch(torch.device("cpu"))
    found = head.logits(torch.from_numpy(hidden)).numpy()
    plain = tmp_path / "plain"  # what chooses code is nothing that transformers may see here
    shutil.copytree(folder, plain)
    config = json.loads((plain / "config.json").read_text())
    for key in ("_attn_implementation", "attn_implementation", "_experts_implementation"):
        config.pop(key, None)
    (plain / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        wanted = transformers_model(plain)(torch.from_numpy(tokens.astype(np.int64))).logits
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-4)


# Form of config.json → (what makes it so, words of the message).
REFUSED: dict[str, tuple[Change | str, str]] = {
    "number type auto": (put(dtype="auto"), "dtype"),
    "number type a function": (put(dtype="load"), "dtype"),
    "sizes as text": (put(hidden_size="64"), "hidden_size"),
    "half a layer": (put(num_hidden_layers=2.5), "num_hidden_layers"),
    "no layer": (put(num_hidden_layers=0), "num_hidden_layers"),
    "layers below zero": (put(num_hidden_layers=-1), "num_hidden_layers"),
    "no heads": (put(num_attention_heads=0), "num_attention_heads"),
    "heads that do not divide": (
        put(num_attention_heads=5, num_key_value_heads=5, head_dim=None),
        "hidden_size|num_attention_heads",
    ),
    "shared heads that do not divide": (put(num_key_value_heads=3), "num_key_value_heads"),
    "odd head width": (put(head_dim=15), "head_dim"),
    "not a number": (put(initializer_range=float("nan")), "initializer_range"),
    "epsilon below zero": (put(rms_norm_eps=-1.0), "rms_norm_eps"),
    "epsilon infinite": (put(rms_norm_eps=float("inf")), "rms_norm_eps"),
    "tied as text": (put(tie_word_embeddings="false"), "tie_word_embeddings"),
    "unknown scaling": (put(rope_parameters={"rope_type": "hyper"}), "hyper"),
    "unknown old scaling": (old_rope(1e4, type="hyper", factor=2.0), "hyper"),
    "no window": (put(sliding_window=0), "sliding_window"),
    "a window below zero": (put(sliding_window=-1), "sliding_window"),
    "both ways": (put(is_causal=False), "found is_causal False"),
    "both ways as Gemma says it": (put(use_bidirectional_attention=True), "see those that follow"),
    "factor as text": (old_rope(1e4, type="linear", factor="2"), "factor"),
    "factor zero": (old_rope(1e4, type="linear", factor=0), "factor"),
    "no factor": (old_rope(1e4, type="linear"), "rope_scaling"),
    "theta as text": (put(rope_parameters={"rope_theta": "x"}), "rope_theta"),
    "theta zero": (put(rope_parameters={"rope_theta": 0}), "rope_theta"),
    "scaling as text": (put(rope_parameters="linear"), "rope_parameters"),
    "a method's name": (put(to_dict="x"), "to_dict"),
    "names of attributes": (put(attribute_map={"hidden_size": "vocab_size"}), "attribute_map"),
    "a list of types": (put(model_type=["llama"]), "model_type"),
    "a share as a list": (put(partial_rotary_factor=[0.5]), "partial_rotary_factor"),
    "a class's name": (put(__class__="x"), "__class__"),
    "layers of their own": (put(per_layer_config={"0": {"hidden_size": 32}}), "per_layer_config"),
    "class as a number": (put(architectures=7), "found 7"),
    "classes that nobody knows": (put(architectures=["New", "Other"]), "found New, Other"),
    "class without a head": (put(architectures=["LlamaModel"]), "LlamaModel"),
    "weights elsewhere": (put(transformers_weights="../../x.safetensors"), "transformers_weights"),
    "a million million layers": (put(num_hidden_layers=10**12), "num_hidden_layers"),
    "a huge vocabulary": (put(vocab_size=2**40), "vocab_size"),
    "a huge hidden size": (put(hidden_size=2**40), "hidden_size"),
    "a huge layer": (put(intermediate_size=2**40), "intermediate_size"),
    "huge heads": (put(head_dim=2**40), "head_dim"),
    "too many positions": (put(max_position_embeddings=10**15), "max_position_embeddings"),
    "too many labels": (put(num_labels=10**9), "num_labels"),
    "too many layers inside": (put(text_config={"num_hidden_layers": 10**9}), "text_config"),
    "quantized under an old name": (put(compression_config={"format": "x"}), "no quant_method"),
    "quantized as text": (put(quantization_config="gptq"), "quantization_config"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_check_config_refuses_by_key(form, base, tmp_path):
    change, words = REFUSED[form]
    folder = changed(base, tmp_path / "model", change)
    with pytest.raises(StageError, match=words) as caught:
        verify.check_config(folder)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE
    assert "config.json" in str(caught.value)


TEXTS = {
    "array": "[]",
    "number": "7",
    "mark": "\ufeff{}",
    "torn": "{" * 3000,
    "deep": '{"a":' * 100_000,
    "digits": "1" * 5000,
    "two": "{} {}",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_check_config_refuses_what_is_no_object(kind, base, tmp_path):
    folder = changed(base, tmp_path / "model", TEXTS[kind])
    with pytest.raises(StageError, match=r"config\.json"):
        verify.check_config(folder)


def test_check_config_refuses_a_config_without_end(base, tmp_path):
    folder = changed(base, tmp_path / "model", " " * (9 << 20))
    with pytest.raises(StageError, match=r"at most .* bytes"):
        verify.check_config(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_check_config_refuses_code_at_any_depth(name, base, tmp_path):
    folder = changed(base, tmp_path / "model", put())
    (folder / name).write_text(json.dumps({"a": [{"auto_map": {"AutoModel": "x.Y"}}]}))
    with pytest.raises(StageError, match=name) as caught:
        verify.check_config(folder)
    assert caught.value.failure == Failure.CUSTOM_CODE


def test_mistral_with_kinds_of_layers_is_the_class_that_transformers_takes(base, tmp_path):
    """AutoConfig takes another class then, whose layers do not all have the window."""
    from transformers import AutoConfig

    kinds = ["full_attention", "sliding_attention"]
    for name, layers in (("mistral", kinds), ("mistral", None), ("ministral", kinds)):
        described = put(model_type=name, layer_types=layers, sliding_window=16)
        folder = changed(base, tmp_path / f"{name}-{layers}", described)
        wanted = AutoConfig.from_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert type(transformers_config(config)) is type(wanted)
        assert complete(config)["layer_types"] == wanted.layer_types


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(model_type="qwen3", layer_types=["full_attention", "linear_attention"]), "linear_att"),
        (put(model_type="gemma2", hidden_act=None, sliding_window=None), "sliding_window"),
    ],
)
def test_check_runs_refuses_what_transformers_builds_and_cannot_run(change, words, base, tmp_path):
    folder = changed(base, tmp_path / "model", change)
    with pytest.raises(StageError, match=words) as caught:
        verify.check_runs(Checkpoint(folder))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_complete_has_the_defaults_of_transformers():
    found = complete({"model_type": "mistral", "rope_scaling": None, "rope_theta": 5.0})
    assert found["sliding_window"] == 4096
    assert found["rms_norm_eps"] == 1e-6
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 5.0}


def test_complete_names_the_class_that_counts_first_and_alone():
    """llama.cpp's converter looks at the first."""
    config = {"model_type": "llama", "architectures": ["New", "LlamaForCausalLM", "LlamaModel"]}
    assert complete(config)["architectures"] == ["LlamaForCausalLM"]


def test_read_configuration_takes_what_is_kept_only_of_this_config(base, tmp_path):
    folder = changed(base, tmp_path / "model", put())
    write_configuration(folder)
    kept = json.loads((folder / FILE).read_text())
    kept["configuration"]["rms_norm_eps"] = 0.25
    (folder / FILE).write_text(json.dumps(kept))
    assert read_configuration(folder)["rms_norm_eps"] == 0.25
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert read_configuration(folder)["rms_norm_eps"] == 1e-6


def test_load_drops_what_chooses_code(project, base, tmp_path):
    choices = {"_attn_implementation": "a/b", "notes": {"use_kernels": True}}
    source = changed(base, tmp_path / "model", put(**choices))
    project.compose(f"model.path={source}")
    project.stage("load")
    model = project.root / "artifacts/model"
    config = json.loads((model / "config.json").read_text())
    assert "_attn_implementation" not in config
    assert config["notes"] == {}
    assert json.loads((source / "config.json").read_text())["_attn_implementation"] == "a/b"
    step = {"step": "drop_config_keys", "keys": ["_attn_implementation", "notes.use_kernels"]}
    assert json.loads((model / "manifest.json").read_text())["transforms"] == [step]
    assert "rope_theta" in read_configuration(model)["rope_parameters"]


def test_check_config_takes_code_that_transformers_has_by_itself(base, tmp_path):
    """Its own is run, and the reference to the checkpoint's is left out."""
    own = {
        "AutoConfig": "configuration_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
    }
    folder = changed(base, tmp_path / "model", put(auto_map=own))
    verify.check_config(folder)
    for evil in ("modeling_llama.Evil", "someone/else--modeling_llama.LlamaForCausalLM"):
        others = own | {"AutoModelForCausalLM": evil}
        folder = changed(base, tmp_path / evil.replace("/", "-"), put(auto_map=others))
        with pytest.raises(StageError) as caught:
            verify.check_config(folder)
        assert caught.value.failure == Failure.CUSTOM_CODE
