"""Figures for hardware that is not here: their formula, and that they never pass for measured."""

import json
from dataclasses import replace

import pytest

from quantline.config.compose import compose, load_params
from quantline.config.targets import Gate, Hardware, Optimize
from quantline.errors import ConfigError
from quantline.files import MIB
from quantline.paths import MODEL
from quantline.report.build import collect_report
from quantline.report.gates import check_gate
from quantline.report.page import render_page
from quantline.report.selection import choose, optimized_value
from quantline.report.speed_estimate import bytes_read, estimate_decoding
from tests.helpers.report import ARCH, CONFIG, TARGET, make_report, make_row, write_measured

DEVICE = TARGET.model_copy(update={"hardware": Hardware(name="small board", bandwidth_gb_s=16)})
DEEP = DEVICE.model_copy(update={"context": 4096})
TENSORS = {
    "model.embed_tokens.weight": {"weights": 384 * 256, "bytes": 2 * 384 * 256},
    "model.layers.0.self_attn.q_proj.weight": {"weights": 65536, "bytes": 40000},
    "lm_head.weight": {"weights": 384 * 256, "bytes": 60000},
}


def test_bytes_read_are_every_weight_once_but_of_the_embedding_one_row():
    assert ARCH.embedding in TENSORS and not ARCH.tied
    assert bytes_read(TENSORS, ARCH) == 2 * 256 + 40000 + 60000
    tied = {name: tensor for name, tensor in TENSORS.items() if name != "lm_head.weight"}
    assert bytes_read(tied, replace(ARCH, tied=True)) == 2 * 384 * 256 + 40000


def test_bytes_read_of_experts_are_those_that_a_token_is_sent_to():
    sparse = replace(ARCH, experts=8, experts_used=2)
    block = "model.layers.0.block_sparse_moe"
    experts = {
        f"{block}.experts.{number}.w1.weight": {"weights": 100, "bytes": 80} for number in range(8)
    }
    router = {f"{block}.gate.weight": {"weights": 8, "bytes": 16}}
    assert bytes_read(experts | router, sparse) == pytest.approx(2 * 80 + 16)
    formula = estimate_decoding(experts, "llama.cpp", DEVICE, sparse)["formula"]
    assert "2 of 8 experts" in formula


def test_estimate_decoding_is_the_bandwidth_over_the_bytes_of_weights_and_cache():
    estimate = estimate_decoding(TENSORS, "llama.cpp", DEVICE, ARCH)
    assert estimate["decode_tok_s"] == pytest.approx(16e9 / 100512)
    assert estimate["provenance"] == "estimated" and estimate["hardware"] == "small board"
    assert estimate["formula"] == (
        "16 GB/s ÷ (0.1 MiB of weights as stored and no KV cache) = at most 159,185 tokens/s"
    )
    deep = estimate_decoding(TENSORS, "llama.cpp", DEEP, ARCH)
    assert deep["decode_tok_s"] == pytest.approx(16e9 / (100512 + 6 * MIB))
    assert "6.0 MiB of KV cache at 4096 tokens" in deep["formula"]
    wide = estimate_decoding(TENSORS, "onnxruntime", DEEP, ARCH)
    # Its cache is in float32.
    assert wide["decode_tok_s"] == pytest.approx(16e9 / (100512 + 12 * MIB))


def test_estimate_decoding_needs_hardware_and_a_model():
    assert estimate_decoding(TENSORS, "llama.cpp", TARGET, ARCH) == {}
    assert estimate_decoding(TENSORS, "llama.cpp", DEVICE, None)["decode_tok_s"] is None


def test_estimate_ranks_and_gates_under_its_own_name_alone():
    slow, fast = (
        {
            "decode_tok_s": speed,
            "hardware": "small board",
            "provenance": "estimated",
            "formula": "f",
        }
        for speed in (10.0, 20.0)
    )
    optimize = Optimize(metric="estimated_decode_tok_s", direction="max")
    target = DEVICE.model_copy(update={"optimize": optimize})
    rows = [
        make_row("slow", 1, 0.01, target, estimated=slow),
        make_row("fast", 2, 0.01, target, estimated=fast),
    ]
    choice = choose(rows, target)
    assert choice.pick == "fast"
    assert "largest estimated decoding speed in tokens/s: 20" in choice.reasons[0]
    assert "decoding on small board, estimated: f" in choice.reasons
    optimize = Optimize(metric="decode_tok_s", direction="max")
    by_measured = DEVICE.model_copy(update={"optimize": optimize})
    assert {optimized_value(row, by_measured) for row in rows} == {90.0}
    gate = Gate(metric="estimated_decode_tok_s", operator=">=", threshold=15)
    figures = {"estimated_decode_tok_s": 10.0, "decode_tok_s": 90.0}
    assert check_gate(gate, figures)["verdict"] == "fails"
    unknown = figures | {"estimated_decode_tok_s": None}
    assert check_gate(gate, unknown)["value"] is None


@pytest.mark.parametrize(
    "override",
    [
        "target.optimize.metric=estimated_decode_tok_s",
        "target.gates=[{metric: estimated_decode_tok_s, operator: '>=', threshold: 9}]",
    ],
)
def test_compose_refuses_an_estimate_without_hardware(override):
    with pytest.raises(ConfigError, match="estimated_decode_tok_s needs hardware"):
        compose([override])
    assert compose([override, "target=edge"])["target"]["hardware"]["name"] == "Raspberry Pi 5"


def test_page_has_the_estimate_in_a_part_of_its_own_with_its_formula():
    estimated = {
        "decode_tok_s": 1234.5,
        "hardware": "small board",
        "provenance": "estimated",
        "formula": "16 GB/s ÷ so much",
    }
    row = make_row("a", 2, 0.01, estimated=estimated)
    text = render_page(make_report([row], DEVICE))
    before, _, after = text.partition('id="estimated"')
    assert "≤ 1,234" in after and "16 GB/s ÷ so much" in after
    assert "≤ 1,234" not in before
    assert 'id="estimated"' not in render_page(make_report([make_row("a", 2, 0.01)]))


def test_collect_report_tells_estimated_from_measured(project):
    project.compose(
        "suite=default", "variant=[bf16,gguf-q8_0]", "recipe=[none,q8_0]", "target=edge"
    )
    write_measured("gguf-q8_0", 5, 0.001)
    MODEL.mkdir(parents=True)
    config = {key: value for key, value in CONFIG.items() if key != "head_dim"}
    (MODEL / "config.json").write_text(json.dumps(config))
    (row,) = collect_report(load_params()).measured
    assert row.provenance["estimated_decode_tok_s"] == "estimated"
    assert row.provenance["speed"] == "measured"
    assert row.estimated["hardware"] == "Raspberry Pi 5"
    assert "17 GB/s ÷" in row.estimated["formula"]
    assert "estimated_decode_tok_s" not in row.speed
    assert "estimated_decode_tok_s" not in row.metrics
