"""Merging LoRA adapters: the same numbers as peft's own merge, and every adapter that is refused."""

import json
import shutil

import numpy as np
import pytest

from quantline.ingest import lora
from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.errors import StageError


@pytest.fixture(scope="module")
def adapt(tiny_narrow, tmp_path_factory):
    """adapt(**options) → (adapter folder, merged tensors by peft) on the narrow float32 model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def make(**options):
        folder = tmp_path_factory.mktemp("adapter")
        settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]} | options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_narrow, dtype=torch.float32),
                                   LoraConfig(**settings))
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    if tensor.requires_grad:  # as after training: B is zero before it
                        tensor.add_(0.05 * torch.randn_like(tensor))
        model.save_pretrained(folder)
        merged = model.merge_and_unload().state_dict()
        return folder, {name: tensor.numpy() for name, tensor in merged.items()}

    return make


OPTIONS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
    "dora": {"use_dora": True},
    "whole-modules": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_merging_equals_peft(case, adapt, tiny_narrow, tmp_path):
    folder, wanted = adapt(**OPTIONS[case])
    shutil.copytree(tiny_narrow, tmp_path / "made")
    base = Checkpoint(tiny_narrow)
    step = lora.merge(base, folder, tmp_path / "made")
    made = Checkpoint(tmp_path / "made")
    changed = [name for name in made.names if not np.array_equal(made.raw(name), base.raw(name))]
    assert len(changed) == step["tensors"] == (5 if case == "whole-modules" else 4)
    for name in made.names:
        np.testing.assert_allclose(made.raw(name), wanted[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_load_merges_into_shards_and_leaves_the_source_alone(project, adapt, make_model, tiny_narrow, tmp_path):
    folder, _ = adapt()
    import torch

    source = make_model(tmp_path / "sharded", hidden_size=64, intermediate_size=176, num_key_value_heads=4,
                        tie_word_embeddings=False, dtype=torch.bfloat16, max_shard_size="50KB")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    project.compose(f"model.path={source}", f"model.adapter={folder}")
    project.stage("load")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    base, made = Checkpoint(source), Checkpoint(project.root / "artifacts/model")
    manifest = json.loads((project.root / "artifacts/model/manifest.json").read_text())
    assert manifest["transforms"] == [{"step": "merge_lora", "adapter": str(folder), "r": 4, "lora_alpha": 12,
                                       "use_rslora": False, "use_dora": False, "rank_pattern": {},
                                       "alpha_pattern": {}, "tensors": 4}]
    assert manifest["source"]["adapter"] == str(folder)
    assert "adapter/adapter_model.safetensors" in manifest["files"]
    assert made.names == base.names
    for name in made.names:
        same = np.array_equal(made.raw(name), base.raw(name))
        assert same != ("q_proj" in name or "down_proj" in name), name
        assert made.stored_dtype(name) == "BF16"


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """`change` edits the dictionary of the adapter's tensors."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    with SafetensorsStream(folder / "adapter_model.safetensors", list(tensors)) as stream:
        for name, tensor in tensors.items():
            stream.add(name, tensor)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = {
    "no-file": (lambda f: (f / "adapter_model.safetensors").unlink(), "missing_file", "adapter_model.safetensors"),
    "pickle": (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "unsafe_checkpoint",
               "only a pickle"),
    "not-lora": (lambda f: edit(f, peft_type="IA3"), "adapter_mismatch", "IA3"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), "adapter_mismatch", "pissa"),
    "replicated-layers": (lambda f: edit(f, layer_replication=[[0, 2]]), "adapter_mismatch", "layer_replication"),
    "wrong-rank": (lambda f: edit(f, r=8), "adapter_mismatch", "rank 8"),
    "half-a-pair": (lambda f: rewrite(f, lambda t: t.pop(f"{KEY}.lora_B.weight")), "adapter_mismatch", "down, up"),
    "other-model": (lambda f: rewrite(f, lambda t: t.update({KEY.replace("0", "7") + ".lora_A.weight": t[
        f"{KEY}.lora_A.weight"]})), "adapter_mismatch", "does not have"),
    "wrong-width": (lambda f: rewrite(f, lambda t: t.update({f"{KEY}.lora_A.weight": np.ones((4, 9), np.float32)})),
                    "adapter_mismatch", "(64, 64)"),
    "nan": (lambda f: rewrite(f, lambda t: t[f"{KEY}.lora_A.weight"].fill(np.nan)), "non_finite", "q_proj"),
    "damaged": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "adapter_mismatch", "damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_load_refuses_an_adapter(case, adapt, project, tiny_narrow, tmp_path, capsys):
    folder = tmp_path / "adapter"
    shutil.copytree(adapt()[0], folder)
    break_it, failure, words = REFUSED[case]
    break_it(folder)
    project.compose(f"model.path={tiny_narrow}", f"model.adapter={folder}")
    with pytest.raises(SystemExit) as stop:
        project.stage("load")
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert f"load: load_rejected ({failure}): " in error and words in error
    assert project.events()[-1]["payload"]["failure"] == failure
    assert not list((project.root / "artifacts").iterdir())


def test_an_adapter_on_a_tied_embedding_is_refused(tiny_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with SafetensorsStream(tmp_path / "adapter_model.safetensors", ["x" * 60]) as stream:
        stream.add("base_model.model.model.embed_tokens.weight", np.zeros((384, 256), np.float32))
    with pytest.raises(StageError, match="ties to its other end"):
        lora.Adapter(tmp_path, Checkpoint(tiny_model))
