"""What a run takes follows from the model's sizes, the machine's speed, and earlier runs."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantline.config.compose import compose
from quantline.config.params import Params
from quantline.config.validation import validate
from quantline.doctor.needs import FIXED_BYTES, needs_of, seconds_before, variant_bytes
from quantline.doctor.sizes import ModelSizes, sizes_from, sizes_of
from quantline.run.stage_names import run_name
from tests.helpers.project import ROOT

SIZES = sizes_from(
    [
        ("model.embed_tokens.weight", (1000, 64)),
        *(
            (f"model.layers.{block}.{name}.weight", shape)
            for block in range(3)
            for name, shape in (("q", (64, 64)), ("up", (128, 64)), ("norm", (64,)))
        ),
    ],
    file_bytes=2 * 101_056,
)


def composed(*overrides: str) -> Params:
    return validate(compose(overrides, root=ROOT))


def sizes() -> ModelSizes:
    assert SIZES is not None
    return SIZES


def test_sizes_are_those_of_the_tensors():
    assert sizes().parameters == 64_000 + 3 * (4096 + 8192 + 64)
    assert sizes().blocks == 3
    assert sizes().block_weights == 12_288
    assert sizes().weights == 3 * 12_288
    assert (sizes().vocabulary, sizes().hidden) == (1000, 64)


def test_an_expert_is_a_matrix_and_towers_are_not_the_text():
    found = sizes_from(
        [
            ("model.embed_tokens.weight", (1000, 64)),
            ("model.layers.0.experts.up", (4, 128, 64)),
            ("vision.blocks.0.weight", (64, 64)),
            ("vision.blocks.1.weight", (64, 64)),
        ],
        1,
    )
    assert found is not None
    assert found.matrices == [(128, 64)] * 4
    assert found.blocks == 1


def test_sizes_of_reads_headers_and_says_so_of_what_has_no_blocks(tmp_path):
    zeros = {"a.weight": np.zeros((4, 4), np.float32)}
    save_file(zeros, tmp_path / "model.safetensors")
    assert sizes_of(tmp_path) is None
    zeros |= {"layers.0.b.weight": np.zeros((8, 4), np.float32)}
    save_file(zeros, tmp_path / "model.safetensors")
    found = sizes_of(tmp_path)
    assert found is not None
    assert (found.parameters, found.weights, found.hidden) == (48, 32, 4)


def test_needs_name_every_instance_and_grow_with_text_and_slowness():
    params = composed("suite=quick")
    needs = needs_of(params, sizes(), 1e9, {})
    expected = {"load", "calibrate", "reference", "compare"}
    expected |= {f"quantize {name}" for name in params.recipes}
    expected |= {f"{stage} {name}" for stage in ("export", "evaluate") for name in params.variants}
    assert set(needs.seconds) == expected
    assert all(seconds > 0 for seconds in needs.seconds.values())
    assert needs.memory_bytes > FIXED_BYTES
    slower = needs_of(params, sizes(), 1e8, {})
    assert slower.seconds["calibrate"] > 5 * needs.seconds["calibrate"]
    longer = composed("suite=quick", "calibration.sequences=1280")
    more = needs_of(longer, sizes(), 1e9, {})
    assert more.seconds["calibrate"] > 5 * needs.seconds["calibrate"]
    assert more.peak_disk_bytes > needs.peak_disk_bytes
    # The states between all blocks are on the disk for the backward pass.
    assert more.peak_disk_bytes - more.disk_bytes == 1280 * 256 * 64 * 4 * (3 + 5)


def test_workers_of_this_machine_hold_as_much_each():
    alone = needs_of(composed(), sizes(), 1e11, {})
    local = needs_of(composed("executor.workers=3"), sizes(), 1e11, {})
    ray = needs_of(composed("executor=ray", "executor.workers=3"), sizes(), 1e11, {})
    assert local.memory_bytes > alone.memory_bytes
    assert ray.memory_bytes == alone.memory_bytes
    assert local.peak_disk_bytes == ray.peak_disk_bytes > alone.peak_disk_bytes
    assert local.disk_bytes == alone.disk_bytes


def test_needs_know_how_workers_calibrate():
    from quantline.calibration import collect, sums
    from quantline.doctor import needs
    from quantline.model import block_runner

    assert needs.BATCH_TOKENS == block_runner.BATCH_TOKENS
    assert (needs.PARTS, needs.FISHER_BLOCK) == (sums.PARTS, collect.FISHER_BLOCK)


def test_needs_count_refinement():
    refined = "recipes.gptq-w4g128.refine.steps=16"
    plain = needs_of(composed("suite=quick"), sizes(), 1e9, {})
    found = needs_of(composed("suite=quick", refined), sizes(), 1e9, {})
    stage = "quantize gptq-w4g128"
    # 16 steps of 4 sequences of 256 tokens, forwards twice and backwards, at half of the speed.
    least = 16 * 4 * 256 * (8 * sizes().weights + 6 * 64_000) / 1e9 / 0.5
    assert least < found.seconds.pop(stage) - plain.seconds.pop(stage) < 1.5 * least
    assert found.seconds == plain.seconds
    assert found.disk_bytes == plain.disk_bytes
    wide = sizes()._replace(vocabulary=200_000, hidden=4096)
    plain, found = (
        needs_of(composed("suite=quick", *more), wide, 1e9, {}) for more in ((), (refined,))
    )
    assert found.memory_of == stage
    # The head, and logits of some tokens.
    assert found.memory_bytes > FIXED_BYTES + 4 * 200_000 * 4096


def test_needs_know_how_refinement_works():
    from quantline.calibration import output_moments
    from quantline.doctor import refinement
    from quantline.model import activation_store

    assert refinement.CHUNK_VALUES == output_moments.CHUNK_VALUES
    assert refinement.RESIDENT_STATES == activation_store.RESIDENT_BYTES


def test_a_stage_that_has_run_with_these_parameters_takes_what_it_took(tmp_path):
    params = composed("suite=quick")
    events = tmp_path / "events.jsonl"
    event = {"stage": "calibrate", "severity": "info", "summary": "", "payload": {"seconds": 77.5}}
    ended = {"reason_code": "stage_finished", "run_id": run_name("calibrate", None, params)}
    events.write_text(json.dumps(event | ended) + "\n{torn\n")
    needs = needs_of(params, sizes(), 1e9, seconds_before(events))
    assert needs.seconds["calibrate"] == 77.5
    assert needs.measured == {"calibrate"}


@pytest.mark.parametrize(
    ("variant", "bits"), [("bf16", 16), ("gguf-q4_k_m", 4.85), ("gptq-w4g128", 4.3)]
)
def test_a_bundle_has_the_bits_of_its_recipe(variant, bits):
    found = variant_bytes(composed("suite=quick"), variant, sizes())
    rest = sizes().parameters - sizes().weights
    rest_bits = bits if variant.startswith("gguf") else 16
    assert found == pytest.approx((sizes().weights * bits + rest * rest_bits) / 8, rel=0.01)
