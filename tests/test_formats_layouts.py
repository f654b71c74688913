"""The GPTQ and AWQ layouts: packing against plain arithmetic on words, and every layer read back to the bit."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounded import differing, rounded
from safetensors.numpy import load_file, save_file

from quantline.quantized.store import GroupedLinear
from quantline.model.checkpoint import Checkpoint
from quantline.config.params import Variant
from quantline.formats.safetensors import container as safetensors
from quantline.formats.safetensors.layouts import awq, gptq
from quantline.errors import Failure, StageError


def values(seed: int, rows: int, columns: int, bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 5))
def test_gptq_words_are_a_stream_of_bits_down_the_inputs(seed, bits, blocks, columns):
    numbers = values(seed, 32 * blocks, columns, bits)
    words = gptq.pack(numbers, bits)
    assert words.dtype == np.int32 and words.shape == (bits * blocks, columns)
    for column in range(columns):
        stream = sum(int(number) << (bits * place) for place, number in enumerate(numbers[:, column]))
        assert words[:, column].view(np.uint32).tolist() == [(stream >> 32 * k) & 0xFFFFFFFF for k in range(bits * blocks)]
    assert np.array_equal(gptq.unpack(words, bits), numbers)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
def test_awq_words_hold_eight_outputs_in_its_order(seed, rows, blocks):
    numbers = values(seed, rows, 8 * blocks, 4)
    words = awq.pack(numbers)
    assert words.dtype == np.int32 and words.shape == (rows, blocks)
    for row in range(rows):
        for block in range(blocks):
            eight = numbers[row, 8 * block:8 * block + 8]
            wanted = sum(int(eight[output]) << 4 * place for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
            assert int(words[row, block].view(np.uint32)) == wanted
    assert np.array_equal(awq.unpack(words), numbers)


def write(folder, model, quantized, layout: str) -> dict[str, str]:
    folder.mkdir()
    return safetensors.write(model, quantized, folder, Variant(recipe="rounded", format="safetensors",
                                                               runtime="transformers", layout=layout))


@pytest.mark.parametrize(("layout", "bits", "group_size", "symmetric"), [
    ("gptq", 4, 32, False), ("gptq", 4, 128, True), ("gptq", 3, 32, False), ("gptq", 2, 64, True), ("gptq", 8, -1, True),
    ("awq", 4, 32, False), ("awq", 4, 128, True), ("awq", 4, -1, False)])
def test_every_layer_reads_back_to_the_bit(tmp_path, tiny_model, layout, bits, group_size, symmetric):
    model = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", model, bits, group_size, symmetric)
    requested = write(tmp_path / "out", model, quantized, layout)
    held = safetensors.read_back(tmp_path / "out", model)
    assert requested == {name: one.type for name, one in held.items()} and f"int{bits}" in requested.values()
    assert differing(safetensors, tmp_path / "out", model, quantized) == []
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (layout, bits, group_size)
    if layout == "gptq":
        assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_a_changed_bit_is_seen(tmp_path, tiny_model, layout):
    model = Checkpoint(tiny_model)
    quantized = rounded(tmp_path / "q", model)
    write(tmp_path / "out", model, quantized, layout)
    path, module = tmp_path / "out/model.safetensors", "model.layers.1.mlp.down_proj"
    tensors = load_file(path)
    for part in ("qweight", "qzeros", "scales"):
        changed = tensors[f"{module}.{part}"].copy()
        changed.reshape(-1).view(np.uint8)[9] ^= 16
        save_file(tensors | {f"{module}.{part}": changed}, path)
        assert differing(safetensors, tmp_path / "out", model, quantized) == [f"{module}.weight"]


def linear(rows: int, columns: int, bits: int, scale: float = 0.5) -> GroupedLinear:
    return GroupedLinear(values(0, rows, columns, bits), np.full((rows, 1), scale, np.float32),
                         np.ones((rows, 1), np.uint8), bits, columns, False)


@pytest.mark.parametrize(("module", "layer", "failure", "words"), [
    (awq, linear(8, 32, 3), Failure.UNSUPPORTED_WIDTH, "expected 4 bits for the AWQ layout, found 3"),
    (awq, linear(12, 32, 4), Failure.UNSUPPORTED_WIDTH, "a side of 12"),
    (gptq, linear(32, 40, 3), Failure.UNSUPPORTED_WIDTH, "a side of 40"),
    (gptq, linear(32, 32, 4, 2.0**-30), Failure.READBACK_MISMATCH, "scales of x that float16 holds"),
])
def test_what_a_layout_cannot_hold_is_refused_and_another_named(module, layer, failure, words):
    with pytest.raises(StageError, match=words) as caught:
        module.tensors("x", layer, np.float16)
    assert caught.value.failure == failure and "layout: compressed-tensors" in str(caught.value)
