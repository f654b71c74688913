"""A model of an architecture without a table, by a converter that the user names: to the end, or to a named failure."""

import json
import shutil

import gguf
import numpy as np
import pytest
from conftest import ROOT
from llama_quantize import quantize
from rounded import rounded, tokens_of, torch_logprobs, torch_model

from quantline.ingest import llama_cpp_converter as converter, verify
from quantline.model import inferred_family as derived
from quantline.model.architecture import architecture
from quantline.model.gguf_checkpoint import FILE, Converted, in_gguf
from quantline.model.checkpoint import Checkpoint
from quantline.config.compose import load_params
from quantline.formats.gguf import imatrix
from quantline.runtimes.runtime import open_runtime
from quantline.errors import Failure, StageError

GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0}
# What llama.cpp's own does for Granite, in a few lines: names by gguf's map, rows of q and k interleaved, the multipliers.
SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
""" + """
from pathlib import Path
(Path(__file__).parent / "environment").write_text("\\n".join(sorted(os.environ)))
import json
from argparse import ArgumentParser
import gguf, ml_dtypes, numpy as np
from safetensors.numpy import load_file
from quantline.text.tokenizer import Tokenizer
from quantline.formats.gguf.architectures import interleave
from quantline.formats.gguf.vocabulary import add_vocabulary

parser = ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--outfile", type=Path)
parser.add_argument("--outtype")
asked = parser.parse_args()
plain, config = gguf.GGMLQuantizationType[asked.outtype.upper()], json.loads((asked.model / "config.json").read_text())
writer = gguf.GGUFWriter(asked.outfile, "granite")
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_block_count(config["num_hidden_layers"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
writer.add_vocab_size(config["vocab_size"])
writer.add_attention_scale(config["attention_multiplier"])
writer.add_embedding_scale(config["embedding_multiplier"])
writer.add_residual_scale(config["residual_multiplier"])
writer.add_logit_scale(config["logits_scaling"])
add_vocabulary(writer, Tokenizer(asked.model), config["vocab_size"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GRANITE, config["num_hidden_layers"])
for name, tensor in sorted(load_file(asked.model / "model.safetensors").items()):
    place, tensor = names.get_name(name, try_suffixes=(".weight",)), tensor.astype(np.float32)
    heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
    tensor = tensor[interleave(len(tensor), heads)] if "q_proj" in name or "k_proj" in name else tensor
    kind = plain if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
    SPOIL
    writer.add_tensor(place, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def script(folder, spoil: str = "") -> str:
    """A checkout with a converter in it, which does `spoil` to each tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / converter.SCRIPT).write_text(SCRIPT.replace("SPOIL", spoil))
    return str(folder)


@pytest.fixture(scope="module")
def granite(tmp_path_factory, make_model):
    return make_model(tmp_path_factory.mktemp("granite") / "model", "granite", **GRANITE)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, granite) -> Converted:
    """The model with the converter's file beside it."""
    folder = shutil.copytree(granite, tmp_path_factory.mktemp("converted") / "model")
    converter.convert(script(folder.parent / "checkout"), folder)
    return Converted(folder)


@pytest.fixture
def ready(project, granite, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the process that evaluate starts
    project.base += ["recipe=[none,q4_k_m,q4_k_m-curvature]", "variant=[gguf-f32,gguf-q4_k_m,gguf-q4_k_m-curvature]",
                     f"model.path={granite}", f"model.converter={script(tmp_path / 'checkout')}",
                     "+recipes.q4_k_m.overrides={attn_v: Q8_0}"]
    project.compose()
    return project


def test_from_a_checkpoint_to_figures(ready, granite, tmp_path):
    for stage in ("load", "calibrate", "reference"):
        ready.stage(stage)
    params = load_params()
    for recipe in params.recipes:
        ready.stage("quantize", recipe)
    for variant in params.variants:
        ready.stage("export", variant)
        ready.stage("evaluate", variant)
    bundles = {name: ready.root / "artifacts/exports" / name for name in params.variants}

    # The file computes what torch does, and what was measured says so too.
    source = Checkpoint(granite)
    tokens, plain = tokens_of(source, 2, 48), rounded(tmp_path / "plain", source, bits=0)
    found = open_runtime("llama.cpp", bundles["gguf-f32"], 1).logprobs(tokens)
    assert np.abs(found - torch_logprobs(torch_model(source, plain), tokens)).max() <= 1e-3
    metrics = {name: json.loads((ready.root / f"metrics/{name}.json").read_text()) for name in params.variants}
    assert metrics["gguf-f32"]["mean_kld"] < 1e-6 < metrics["gguf-q4_k_m-curvature"]["mean_kld"]
    assert metrics["gguf-q4_k_m-curvature"]["mean_kld"] < metrics["gguf-q4_k_m"]["mean_kld"]

    # Who converted it stands in the manifest, and the settings that it wrote in the file.
    manifest = json.loads((bundles["gguf-q4_k_m"] / "manifest.json").read_text())
    step = next(step for step in manifest["transforms"] if step["step"] == "convert")
    assert step["path"] == str(tmp_path / "checkout" / converter.SCRIPT) and len(step["sha256"]) == 64
    assert step["outtype"] == "bf16" and step["commit"] is None
    fields = gguf.GGUFReader(bundles["gguf-q4_k_m"] / "model.gguf").fields
    assert fields["granite.logit_scale"].contents() == 4.0 and "quantline.recipe" in fields

    # Types and bytes are those that llama.cpp makes of the converter's file.
    matrix = imatrix.read(ready.root / "artifacts/quantized/q4_k_m/imatrix.gguf")
    importance = {name: entry.values() for name, entry in matrix.entries.items()}
    assert len(importance) == 14
    target = tmp_path / "theirs.gguf"
    status, said = quantize(ready.root / "artifacts/model" / FILE, target, "Q4_K_M", importance, {"attn_v": "Q8_0"})
    assert status == 0, said
    ours, theirs = ({one.name: one for one in gguf.GGUFReader(path).tensors}
                    for path in (bundles["gguf-q4_k_m"] / "model.gguf", target))
    assert ours.keys() == theirs.keys() and ours["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(np.asarray(tensor.data).view(np.uint8), np.asarray(theirs[name].data).view(np.uint8)), name


def test_the_converter_gets_no_more_of_the_environment_than_it_needs(granite, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    folder = shutil.copytree(granite, tmp_path / "model")
    converter.convert(script(tmp_path / "checkout"), folder)
    names = set((tmp_path / "checkout/environment").read_text().split())
    assert names - {"LC_CTYPE"} <= {*converter.KEPT, "HF_HUB_OFFLINE", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE"}


def test_the_order_of_rows_is_found_by_the_rows(converted):
    source = converted.source
    for name, whole in converted.sources.items():
        order = converted.row_order(name) if len(converted.shape(name)) > 1 else None
        assert order is None or np.array_equal(source.tensor(whole)[order], converted.tensor(name))
    order = converted.row_order("blk.0.attn_q.weight")
    assert sorted(order) == list(range(256)) and order[:3].tolist() == [0, 32, 1]
    assert converted.layer("blk.0.attn_q.weight") == "model.layers.0.self_attn.q_proj"
    assert converted.layer("output_norm.weight") == "model.norm" and converted.layer("rope_freqs.weight") is None


def test_rows_that_the_converter_changed_have_no_order(granite, tmp_path):
    folder = shutil.copytree(granite, tmp_path / "model")
    converter.convert(script(tmp_path / "checkout", "tensor = tensor * 2 if 'attn_v' in place else tensor"), folder)
    assert Converted(folder).row_order("blk.0.attn_v.weight") is None
    assert Converted(folder).row_order("blk.0.attn_output.weight") is not None


FAILURES = {
    "exits": ("sys.exit('no idea what a ' + place + ' is')", "converter_failed", "exit code 1; its last words: no idea what a"),
    "writes nothing": ("sys.exit(0)", "converter_failed", "no file written"),
    "wrong shape": ("tensor = tensor[:, :128] if 'ffn_up' in place else tensor", "converter_failed",
                    "blk.0.ffn_up.weight (512, 256), as model.layers.0.mlp.up_proj.weight is, found (512, 128)"),
    "short embedding": ("tensor = tensor[:300] if 'embd' in place else tensor", "converter_failed",
                        "token_embd.weight (384, 256), found (300, 256)"),
    "no embedding": ("place = place.replace('token_embd', 'tokens')", "converter_failed", "found no such tensor"),
    "quantized": ("kind = gguf.GGMLQuantizationType.Q8_0 if 'ffn_up' in place else kind", "converter_failed", "found Q8_0"),
    "not finite": ("tensor = tensor / 0 if 'ffn_up' in place else tensor", "non_finite", "in blk.0.ffn_up.weight"),
    "no GGUF": ("Path(asked.outfile).write_text('GGUF'); sys.exit(0)", "converter_failed", "one that cannot be read"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_a_converter_makes_wrong_has_a_name(case, granite, tmp_path):
    spoil, failure, words = FAILURES[case]
    folder = shutil.copytree(granite, tmp_path / "model")
    with pytest.raises(StageError) as caught:
        converter.convert(script(tmp_path / "checkout", spoil), folder)
    assert caught.value.failure == failure and words in str(caught.value)


def test_load_leaves_nothing_of_a_conversion_that_failed(ready, tmp_path, capsys):
    script(tmp_path / "checkout", FAILURES["exits"][0])
    with pytest.raises(SystemExit):
        ready.stage("load")
    assert "load: load_rejected (converter_failed): expected " in capsys.readouterr().err
    assert list((ready.root / "artifacts").iterdir()) == []


def test_a_missing_converter_is_named(ready, tmp_path, capsys):
    shutil.rmtree(tmp_path / "checkout")
    with pytest.raises(SystemExit):
        ready.stage("load")
    assert "load_rejected (missing_file): expected a checkout of llama.cpp with convert_hf_to_gguf.py" in capsys.readouterr().err


def test_without_a_converter_the_message_names_the_way(ready, capsys):
    ready.compose("model.converter=null")
    with pytest.raises(SystemExit):
        ready.stage("load")
    error = capsys.readouterr().err
    assert "(unsupported_architecture)" in error and "model.converter=/path/to/llama.cpp" in error


def test_a_family_with_a_table_may_be_converted_too(granite, converted, tiny_model):
    assert isinstance(in_gguf(converted.folder), Converted) and isinstance(in_gguf(granite), Checkpoint)
    assert architecture(converted).layer_index("blk.1.attn_q.weight") == 1
    assert architecture(Checkpoint(tiny_model)).model_type == "llama"


@pytest.mark.parametrize(("family", "sizes"), [
    ("olmo2", {}), ("stablelm", {"tie_word_embeddings": False}), ("cohere", {}), ("granite", GRANITE)])
def test_a_family_without_a_table_runs_block_by_block(family, sizes, tmp_path, make_model, monkeypatch):
    checkpoint = Checkpoint(make_model(tmp_path / "model", family, hidden_size=64, **sizes))
    verify.check_config(checkpoint.folder, "named")
    assert verify.check_whole(checkpoint.folder)["sizes"]["hidden"] == 64
    verify.check_blocks(checkpoint)
    facts = architecture(checkpoint)
    assert {f"{name}.weight" for name in facts.linears()} <= set(checkpoint.names)
    monkeypatch.setattr(verify, "from_config", lambda config: facts.__class__(**vars(facts) | {"logit_scale": 1.5}))
    with pytest.raises(StageError, match="run block by block to be transformers' own") as caught:
        verify.check_blocks(checkpoint)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_a_family_whose_blocks_are_called_otherwise_is_refused(tmp_path, make_model):
    """Bloom's blocks give tuples, and take more than hidden states from each other."""
    source = make_model(tmp_path / "model", "bloom", hidden_size=64, num_key_value_heads=None, intermediate_size=None)
    with pytest.raises(StageError, match="bloom does not run block by block") as caught:
        verify.check_blocks(Checkpoint(source))
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


def test_what_scales_cannot_be_folded_into_is_refused(granite, tmp_path):
    from quantline.config.recipes import RECIPES
    from quantline.recipes.dispatch import round_block
    from quantline.recipes.context import Work

    recipe = RECIPES["awq"](method="awq", bits=4, group_size=32, symmetric=False)
    checkpoint = Checkpoint(granite)
    with pytest.raises(StageError, match="expected layers of granite that scales can be folded into") as caught:
        round_block(Work(recipe, checkpoint, architecture(checkpoint), None, None), 0)
    assert caught.value.failure == Failure.UNSUPPORTED_ARCHITECTURE


@pytest.mark.parametrize("family", ["olmoe", "mamba", "nonsense"])
def test_what_does_not_run_block_by_block_is_no_family(family):
    assert derived.derived({"model_type": family, "num_hidden_layers": 2, "hidden_size": 64}) is None
