"""Figures for hardware that is not here: their formula, and that they never pass for measured ones."""

import json
from dataclasses import replace

import pytest
from test_compare import measured
from test_report import FACTS, TARGET, report, row

from stages import compare as stage
from quantline.config.compose import compose, load_params
from quantline.config.section import ConfigError
from quantline.report import page, selection, speed_estimate as estimates
from quantline.report.gates import check_gate
from quantline.config.params import Gate, Hardware, Optimize

MIB = 2**20
DEVICE = TARGET.model_copy(update={"hardware": Hardware(name="small board", bandwidth_gb_s=16)})
TENSORS = {"model.embed_tokens.weight": {"weights": 384 * 256, "bytes": 2 * 384 * 256},
           "model.layers.0.self_attn.q_proj.weight": {"weights": 65536, "bytes": 40000},
           "lm_head.weight": {"weights": 384 * 256, "bytes": 60000}}


def test_a_token_reads_every_weight_once_but_of_the_embedding_one_row():
    assert FACTS.embedding in TENSORS and not FACTS.tied
    assert estimates.bytes_read(TENSORS, FACTS) == 2 * 256 + 40000 + 60000
    tied = {name: about for name, about in TENSORS.items() if name != "lm_head.weight"}
    assert estimates.bytes_read(tied, replace(FACTS, tied=True)) == 2 * 384 * 256 + 40000


def test_of_experts_a_token_reads_those_that_it_is_sent_to():
    sparse = replace(FACTS, experts=8, experts_used=2)
    experts = {f"model.layers.0.block_sparse_moe.experts.{n}.w1.weight": {"weights": 100, "bytes": 80} for n in range(8)}
    router = {"model.layers.0.block_sparse_moe.gate.weight": {"weights": 8, "bytes": 16}}
    assert estimates.bytes_read(experts | router, sparse) == pytest.approx(2 * 80 + 16)
    assert "2 of 8 experts" in estimates.decode(experts, "llama.cpp", DEVICE, sparse)["formula"]


def test_the_speed_is_the_bandwidth_over_the_bytes_of_weights_and_cache():
    found = estimates.decode(TENSORS, "llama.cpp", DEVICE, FACTS)
    assert found["decode_tok_s"] == pytest.approx(16e9 / 100512)
    assert found["provenance"] == "estimated" and found["hardware"] == "small board"
    assert found["formula"] == "16 GB/s ÷ (0.1 MiB of weights as stored and no KV cache) = at most 159,185 tokens/s"
    deep = estimates.decode(TENSORS, "llama.cpp", DEVICE.model_copy(update={"context": 4096}), FACTS)
    assert deep["decode_tok_s"] == pytest.approx(16e9 / (100512 + 6 * MIB))
    wide = estimates.decode(TENSORS, "onnxruntime", DEVICE.model_copy(update={"context": 4096}), FACTS)
    assert wide["decode_tok_s"] == pytest.approx(16e9 / (100512 + 12 * MIB))  # its cache is in float32
    assert "6.0 MiB of KV cache at 4096 tokens" in deep["formula"]


def test_without_a_description_there_is_no_estimate_and_without_a_model_it_is_unknown():
    assert estimates.decode(TENSORS, "llama.cpp", TARGET, FACTS) == {}
    assert estimates.decode(TENSORS, "llama.cpp", DEVICE, None)["decode_tok_s"] is None


def test_an_estimate_ranks_and_gates_under_its_own_name_alone():
    slow, fast = ({"decode_tok_s": speed, "hardware": "small board", "provenance": "estimated", "formula": "f"}
                  for speed in (10.0, 20.0))
    target = DEVICE.model_copy(update={"optimize": Optimize(metric="estimated_decode_tok_s", direction="max")})
    rows = [row("slow", 1, 0.01, target, estimated=slow), row("fast", 2, 0.01, target, estimated=fast)]
    chosen, _, reasons = selection.pick(rows, target)
    assert chosen == "fast" and "decoding on small board, estimated: f" in reasons
    measured_first = DEVICE.model_copy(update={"optimize": Optimize(metric="decode_tok_s", direction="max")})
    assert {selection.worth(one, measured_first) for one in rows} == {90.0}
    gate = Gate(metric="estimated_decode_tok_s", operator=">=", threshold=15)
    assert check_gate(gate, {"estimated_decode_tok_s": 10.0, "decode_tok_s": 90.0})["verdict"] == "fails"
    assert check_gate(gate, {"estimated_decode_tok_s": None, "decode_tok_s": 90.0})["value"] is None


@pytest.mark.parametrize("override", ["target.optimize.metric=estimated_decode_tok_s",
                                      "target.gates=[{metric: estimated_decode_tok_s, operator: '>=', threshold: 9}]"])
def test_asking_for_an_estimate_without_hardware_is_an_error(override):
    with pytest.raises(ConfigError, match="estimated_decode_tok_s needs hardware"):
        compose([override])
    assert compose([override, "target=edge"])["target"]["hardware"]["name"] == "Raspberry Pi 5"


def test_the_page_has_the_estimate_in_a_part_of_its_own_with_its_formula():
    one = row("a", 2, 0.01, estimated={"decode_tok_s": 1234.5, "hardware": "small board", "provenance": "estimated",
                                       "formula": "16 GB/s ÷ so much"})
    text = page.html(report([one]) | {"target": DEVICE.model_dump()})
    before, _, after = text.partition('id="estimated"')
    assert "≤ 1,234" in after and "16 GB/s ÷ so much" in after and "≤ 1,234" not in before
    assert 'id="estimated"' not in page.html(report([row("a", 2, 0.01)]))


def test_the_report_tells_estimated_from_measured(project):
    project.compose("suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]", "target=edge")
    measured("gguf-q8_0", 5, 0.001)
    (project.root / "artifacts/model").mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 384,
              "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6}
    (project.root / "artifacts/model/config.json").write_text(json.dumps(config))
    found = next(one for one in stage.build(load_params())["variants"] if one["status"] == "ok")
    assert found["provenance"]["estimated_decode_tok_s"] == "estimated" and found["provenance"]["speed"] == "measured"
    assert found["estimated"]["hardware"] == "Raspberry Pi 5" and "17 GB/s ÷" in found["estimated"]["formula"]
    assert "estimated_decode_tok_s" not in found["speed"] and "estimated_decode_tok_s" not in found["metrics"]
