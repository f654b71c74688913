"""A GGUF file as a source: what is read of it, against the model it was written from."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from transformers import AutoConfig

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize.gguf import check_agreement, tokenizer, write_folder
from quantline.ingest.dequantize.gguf.agreement import relative_difference
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from tests.helpers.bundles import settled
from tests.helpers.gguf import file_of, write_unquantized
from tests.helpers.llama_quantize import quantize
from tests.helpers.models import write_model
from tests.helpers.quantized_sources import plain_tensors
from tests.helpers.sizes import LLAMA3_ROPE

MODEL = Path("artifacts/model")
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Model type → what is unlike the defaults that transformers would take where it reads nothing.
MODELS = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 3e-5},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"rope_parameters": YARN},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 20.0, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gpt2": {},
}
# Keys of a configuration that say nothing about what is computed.
BESIDE = frozenset(
    {
        *("dtype", "initializer_range", "transformers_version", "_name_or_path", "pretraining_tp"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "feed_forward_length", "use_cache"),
        *("attention_dropout", "unk_token_id", "head_dim"),
    }
)


def write_gguf(folder: Path, model_type: str = "llama", **sizes) -> tuple[Path, Path]:
    """Write a model and its GGUF file in float32; return both paths."""
    plain = write_model(folder / "plain", model_type, **SMALL | sizes)
    written = write_unquantized(folder, settled(plain), "float32")
    return plain, file_of(written.bundle)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, Path]:
    """A model with widths for k-quants, and its file in Q4_K_M."""
    root = tmp_path_factory.mktemp("llama")
    plain, file = write_gguf(root, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    status, log = quantize(file, root / "q4_k_m.gguf", "Q4_K_M")
    assert status == 0, log
    return plain, root / "q4_k_m.gguf"


@pytest.mark.parametrize("model_type", MODELS)
def test_write_folder_gives_the_model_that_the_file_was_written_from(model_type, tmp_path):
    plain, file = write_gguf(tmp_path, model_type, **MODELS[model_type])
    write_folder(file, tmp_path / "found")
    wanted = plain_tensors(plain)
    found = plain_tensors(tmp_path / "found")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(found[name].astype(np.float32), tensor.astype(np.float32)), name
    theirs = AutoConfig.from_pretrained(plain).to_dict()
    ours = AutoConfig.from_pretrained(tmp_path / "found").to_dict()
    keys = (theirs.keys() | ours.keys()) - BESIDE
    differences = {key: (theirs.get(key), ours.get(key)) for key in keys}
    assert {key: pair for key, pair in differences.items() if pair[0] != pair[1]} == {}
    check_agreement(file, Checkpoint(tmp_path / "found"))


def test_blocks_become_what_gguf_makes_of_them_rounded_once(llama, tmp_path):
    plain, file = llama
    step = write_folder(file, tmp_path / "found")
    assert step["method"] == "gguf"
    assert step["dtype"] == "bfloat16"
    assert step["settings"]["architecture"] == "llama"
    assert step["settings"]["types"].keys() == {"F32", "Q4_K", "Q6_K"}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found = Checkpoint(tmp_path / "found")
    down = tensors["blk.0.ffn_down.weight"]
    values = gguf.quants.dequantize(down.data, down.tensor_type)
    kept = found.raw("model.layers.0.mlp.down_proj.weight")
    assert np.array_equal(kept, values.astype(kept.dtype))
    # Rows of queries lie in another order there.
    query = tensors["blk.0.attn_q.weight"]
    values = gguf.quants.dequantize(query.data, query.tensor_type)
    rows = values.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    kept = found.raw("model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(kept, rows.astype(kept.dtype))
    norm = "model.layers.0.input_layernorm.weight"
    assert np.array_equal(found.raw(norm), Checkpoint(plain).raw(norm))


def test_load_takes_a_gguf_file(project, llama, capsys):
    plain, file = llama
    project.compose(f"model.path={file}")
    project.stage("load")
    manifest = json.loads((MODEL / "manifest.json").read_text())
    assert manifest["source"]["path"] == str(file)
    assert list(manifest["files"]) == ["q4_k_m.gguf"]
    assert manifest["transforms"][0]["step"] == "dequantize"
    assert manifest["dtype"] == "bfloat16"
    assert Checkpoint(MODEL).names == Checkpoint(plain).names
    text = "Ada met 305 old letters,\n  isn't it?"
    assert Tokenizer(MODEL).encode(text) == Tokenizer(plain).encode(text)
    assert (MODEL / "chat_template.jinja").read_text() == (
        plain / "chat_template.jinja"
    ).read_text()
    lineage = json.loads((MODEL / "lineage.json").read_text())
    assert list(lineage["files"]) == [str(file)]
    assert "by dequantizing" in capsys.readouterr().out


def rewritten(file: Path, target: Path, fields=None, tensors=None, architecture=None) -> Path:
    """Copy a file of floats, with other values of its metadata and of its tensors."""
    reader = gguf.GGUFReader(file)
    old = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture or old)
    changed = fields or {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changed:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for name, (value, kind) in changed.items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        values = (tensors or {}).get(tensor.name, np.array(tensor.data))
        writer.add_tensor(tensor.name, values)
    for name in (tensors or {}).keys() - {tensor.name for tensor in reader.tensors}:
        writer.add_tensor(name, tensors[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def floats(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("floats"))[1]


STRING = gguf.GGUFValueType.STRING
UINT32 = gguf.GGUFValueType.UINT32
ARCHITECTURE = Failure.UNSUPPORTED_ARCHITECTURE
REFUSED = {
    "unknown architecture": ({"architecture": "nonsense"}, ARCHITECTURE, "nonsense"),
    "a mixture that is read as none": (
        {"fields": {"llama.expert_count": (8, UINT32)}},
        ARCHITECTURE,
        "llama.expert_count = 8",
    ),
    "unknown rope scaling": (
        {"fields": {"llama.rope.scaling.type": ("ntk", STRING)}},
        ARCHITECTURE,
        "ntk of 1.0",
    ),
    "a tensor that nobody reads": (
        {"tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
        ARCHITECTURE,
        "attn_sinks",
    ),
    "not finite": (
        {"tensors": {"output_norm.weight": np.full(64, np.inf, np.float32)}},
        Failure.NON_FINITE,
        "model.norm.weight",
    ),
    "one of several": ({"fields": {"split.count": (3, UINT32)}}, Failure.MISSING_SHARD, "3 parts"),
    "another way of splitting": (
        {"fields": {"tokenizer.ggml.pre": ("default", STRING)}},
        Failure.MISSING_TOKENIZER,
        "'default', that transformers does not know",
    ),
    "no tokenizer": (
        {"fields": {"tokenizer.ggml.model": ("rwkv", STRING)}},
        Failure.MISSING_TOKENIZER,
        "rwkv",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_write_folder_refuses(case, floats, tmp_path):
    changes, failure, words = REFUSED[case]
    file = rewritten(floats, tmp_path / "changed.gguf", **changes)
    with pytest.raises(StageError, match=words) as caught:
        write_folder(file, tmp_path / "found")
    assert caught.value.failure == failure


def test_write_folder_refuses_tokens_that_llama_cpp_does_not_have(floats, tmp_path, monkeypatch):
    letter = {"type": "Split", "pattern": {"String": "l"}, "behavior": "Isolated", "invert": False}
    monkeypatch.setitem(tokenizer.SPLITS, "smollm", letter)
    with pytest.raises(StageError, match="that llama") as caught:
        write_folder(floats, tmp_path / "found")
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_write_folder_refuses_a_file_that_is_cut_short(floats, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(floats.read_bytes()[:-4000])
    with pytest.raises(StageError, match="cut short") as caught:
        write_folder(cut, tmp_path / "found")
    assert caught.value.failure == Failure.MISSING_SHARD


@pytest.mark.parametrize(
    ("place", "octets", "failure", "words"),
    [
        (0, b"GGML", Failure.MISSING_SHARD, "begins with b'GGML'"),
        (4, b"\x09\x00\x00\x00", ARCHITECTURE, "found version 9"),
        (None, b"\x1f\x00\x00\x00", ARCHITECTURE, "one of type 31"),
    ],
    ids=["another format", "a newer version", "a type that was given up"],
)
def test_write_folder_refuses_what_gguf_does_not_read(
    place, octets, failure, words, floats, tmp_path
):
    content = bytearray(floats.read_bytes())
    if place is None:  # after a tensor's name, the count of its sides, and two of them
        name = b"blk.0.ffn_down.weight"
        place = content.index(name) + len(name) + 4 + 2 * 8
    content[place : place + 4] = octets
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(StageError, match=words) as caught:
        write_folder(tmp_path / "other.gguf", tmp_path / "found")
    assert caught.value.failure == failure


def test_check_agreement_refuses_logits_that_say_nothing(floats, tmp_path):
    rows = {}
    for tensor in gguf.GGUFReader(floats).tensors:
        if "ffn_up" in tensor.name:
            rows[tensor.name] = np.array(tensor.data) * 1e35
    other = rewritten(floats, tmp_path / "other.gguf", tensors=rows)
    write_folder(other, tmp_path / "found")
    with pytest.raises(StageError, match="expected finite logits") as caught:
        check_agreement(other, Checkpoint(tmp_path / "found"))
    assert caught.value.failure == Failure.NON_FINITE


def test_check_agreement_refuses_what_llama_cpp_computes_otherwise(floats, tmp_path):
    write_folder(floats, tmp_path / "found")
    reader = gguf.GGUFReader(floats)
    rows = {}
    for tensor in reader.tensors:
        if "attn_q" in tensor.name or "attn_v" in tensor.name:
            rows[tensor.name] = np.array(tensor.data)[::-1].copy()
    other = rewritten(floats, tmp_path / "other.gguf", tensors=rows)
    with pytest.raises(
        StageError, match="transformers reads this kind of file otherwise"
    ) as caught:
        check_agreement(other, Checkpoint(tmp_path / "found"))
    assert caught.value.failure == ARCHITECTURE


def test_relative_difference_takes_no_account_of_what_all_logits_share():
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    assert relative_difference(logits + 7, logits) < 1e-5
    assert relative_difference(2 * logits, logits) == pytest.approx(1)
    assert relative_difference(logits[:, :40], logits) == float("inf")
    assert not relative_difference(np.full_like(logits, np.nan), logits) <= 1
