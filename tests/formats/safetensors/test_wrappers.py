"""A model that reads images: its language model is rounded, and the rest is handed on."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from quantline.errors import Failure, StageError
from quantline.formats.bundle.verify_container import check_container
from quantline.formats.container import load_container
from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.runtimes.runtime import open_runtime
from tests.helpers.models import write_tokenizer
from tests.helpers.quantized import differing, rounded
from tests.helpers.tensor_files import write_tensors
from tests.helpers.variants import write_variant

CONTAINER = load_container("safetensors")
IMAGE = 5  # the token that stands for a patch of an image
PATCHES = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Checkpoint:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    folder = tmp_path_factory.mktemp("wrapper") / "model"
    folder.mkdir()
    rows = write_tokenizer(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **sizes, num_hidden_layers=2, image_size=32, patch_size=8, projection_dim=64
        ),
        text_config=LlamaConfig(
            **sizes, num_hidden_layers=2, num_key_value_heads=2, vocab_size=rows
        ),
        image_token_index=IMAGE,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": true}')
    return Checkpoint(folder, structure=verify.check_blocks(Checkpoint(folder)))


def logits_of(folder) -> np.ndarray:
    """Return what transformers' wrapper says of a text with an image in it."""
    engine = open_runtime("transformers", folder, 1)
    ids = torch.tensor([[7, 8, *[IMAGE] * PATCHES, 9, 10, 11]])
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return engine.model(input_ids=ids, pixel_values=pixels).logits.float().numpy()


def test_its_head_can_be_rounded_under_the_name_that_transformers_has(checkpoint, tmp_path):
    head = checkpoint.arch.head.removesuffix(".weight")
    assert len(checkpoint.arch.module_names(head)) > 1
    logits = {}
    for name, recipe in (
        ("floats", {"name": "x"}),
        ("eight", {"name": "x", "safetensors_head": True}),
    ):
        quantized = rounded(
            tmp_path / f"q-{name}", checkpoint, 4, 32, True, recipe=recipe, outside=8
        )
        write_variant("safetensors", tmp_path / name, checkpoint, quantized)
        assert differing(CONTAINER, tmp_path / name, checkpoint, quantized) == []
        logits[name] = logits_of(tmp_path / name)
    moved = np.abs(logits["eight"] - logits["floats"]).max()
    assert 0 < moved < 0.02 * np.abs(logits["floats"]).max()


def test_the_language_model_alone_is_rounded(checkpoint, tmp_path):
    structure = checkpoint.structure
    assert structure.text_path
    assert structure.layers == 2
    assert any("vision_tower" in key for key in checkpoint.passed)
    assert any("projector" in key for key in checkpoint.passed)
    assert not any("vision" in name or "projector" in name for name in checkpoint.names)
    quantized = rounded(tmp_path / "q", checkpoint, 8, 32, symmetric=True)
    out = tmp_path / "out"
    write_variant("safetensors", out, checkpoint, quantized)
    assert differing(CONTAINER, out, checkpoint, quantized) == []
    source = load_file(checkpoint.folder / "model.safetensors")
    bundle = load_file(out / "model.safetensors")
    for key in checkpoint.passed:
        assert source[key].tobytes() == bundle[key].tobytes()
    assert (out / "preprocessor_config.json").is_file()
    config = json.loads((out / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert any("vision_tower" in name for name in ignored)
    found, expected = logits_of(out), logits_of(checkpoint.folder)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def without(checkpoint, folder, *parts, **changes):
    """Copy a checkpoint without the tensors that have some words in their names."""
    shutil.copytree(checkpoint.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not any(p in key for p in parts)}
    write_tensors(folder / "model.safetensors", kept)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_wrapper_without_its_towers_is_refused_by_their_names(checkpoint, tmp_path):
    folder = without(checkpoint, tmp_path / "text", "vision_tower", "projector")
    with pytest.raises(StageError, match=r"4 of .*projector, \d+ of .*vision_tower") as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.MISSING_SHARD
    assert "model_type llama and architectures LlamaForCausalLM" in str(caught.value)
    folder = without(checkpoint, tmp_path / "one", "vision_tower.post_layernorm.bias")
    with pytest.raises(StageError, match="1 of model"):
        Checkpoint(folder)


def test_a_tower_of_another_size_is_refused(checkpoint, tmp_path):
    vision = json.loads((checkpoint.folder / "config.json").read_text())["vision_config"]
    other = {"vision_config": vision | {"intermediate_size": 32}}
    folder = without(checkpoint, tmp_path / "other", **other)
    with pytest.raises(StageError, match=r"vision_tower.* to be \(32") as caught:
        Checkpoint(folder)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_the_text_model_of_a_wrapper_is_taken_with_its_own_config(checkpoint, tmp_path):
    folder = without(checkpoint, tmp_path / "text", "vision_tower", "projector")
    tensors = load_file(folder / "model.safetensors")
    renamed = {key.replace("language_model.model.", "model."): t for key, t in tensors.items()}
    renamed = {key.replace("language_model.lm_head", "lm_head"): t for key, t in renamed.items()}
    write_tensors(folder / "model.safetensors", renamed)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text))
    assert verify.check_checkpoint(Checkpoint(folder))["architecture"] == "LlamaForCausalLM"


def test_a_tower_that_changed_by_a_bit_is_caught(checkpoint, tmp_path):
    quantized = rounded(tmp_path / "q", checkpoint, 8, 32, symmetric=True)
    out = tmp_path / "out"
    requested = write_variant("safetensors", out, checkpoint, quantized)

    def check() -> dict:
        return check_container(CONTAINER, out, checkpoint, quantized, requested, False)

    assert set(checkpoint.passed) <= set(check())
    for part in ("vision_tower", "projector"):
        kept = load_file(out / "model.safetensors")
        key = next(key for key in checkpoint.passed if part in key and key.endswith("weight"))
        changed = kept[key].copy()
        changed.view(np.uint16).flat[-1] ^= 1
        write_tensors(out / "model.safetensors", kept | {key: changed})
        with pytest.raises(StageError, match=key) as caught:
            check()
        assert caught.value.failure == Failure.READBACK_MISMATCH
        write_tensors(out / "model.safetensors", kept)


def test_an_image_reaches_the_bundle_as_it_does_the_source(checkpoint, tmp_path):
    quantized = rounded(tmp_path / "q", checkpoint, bits=0)
    write_variant("safetensors", tmp_path / "out", checkpoint, quantized)
    found, expected = logits_of(tmp_path / "out"), logits_of(checkpoint.folder)
    assert np.array_equal(found, expected)
    # The image counts at all:
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint.folder, changed)
    tensors = load_file(changed / "model.safetensors")
    key = next(key for key in checkpoint.passed if "projector" in key and key.endswith("weight"))
    tensors[key] = -tensors[key]
    write_tensors(changed / "model.safetensors", tensors)
    assert not np.array_equal(logits_of(changed), expected)
