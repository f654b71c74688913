"""What a container holds is compared with what it was asked to hold."""

from dataclasses import replace

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.formats.bundle.verify_container import check_container, substitutions
from quantline.formats.container import load_container
from quantline.model.checkpoint import Checkpoint
from tests.helpers.quantized import rounded
from tests.helpers.variants import write_variant

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def three_bits(tmp_path_factory, tiny_model):
    """Three bits in ONNX, which has slots of four: source, store, folder, types."""
    folder = tmp_path_factory.mktemp("three")
    source = Checkpoint(tiny_model)
    quantized = rounded(folder / "q", source, bits=3)
    requested = write_variant("onnx", folder / "out", source, quantized)
    return source, quantized, folder / "out", requested


def check(three_bits, container, **changes):
    source, quantized, folder, requested = three_bits
    arguments = {
        "container": container,
        "folder": folder,
        "source": source,
        "quantized": quantized,
        "requested": requested,
        "fail_on_substitution": False,
    }
    return check_container(**(arguments | changes))


def test_check_container_describes_every_tensor(three_bits):
    source = three_bits[0]
    tensors = check(three_bits, load_container("onnx"))
    assert set(tensors) == set(source.names)
    assert tensors[NAME] == {
        "requested": "int3",
        "actual": "int4",
        "bits_per_weight": 4 + (16 + 4) / 32,
        "bytes": 512 * 256 * (4 + (16 + 4) / 32) / 8,
        "weights": 512 * 256,
    }
    assert tensors["model.norm.weight"]["actual"] == "F32"


def test_check_container_refuses_a_substitution_where_it_has_to(three_bits):
    words = r"expected int3 for .* and 13 more, found int4"
    with pytest.raises(StageError, match=words) as caught:
        check(three_bits, load_container("onnx"), fail_on_substitution=True)
    assert caught.value.failure == Failure.TYPE_SUBSTITUTED


def test_substitutions_summarizes_pairs_with_their_share(three_bits):
    tensors = check(three_bits, load_container("onnx"))
    weights = sum(tensor["weights"] for tensor in tensors.values())
    (pair,) = substitutions(tensors)
    assert (pair["requested"], pair["actual"]) == ("int3", "int4")
    assert len(pair["tensors"]) == 14
    assert pair["share"] == sum(tensors[name]["weights"] for name in pair["tensors"]) / weights


def test_substitutions_is_empty_where_all_is_as_asked():
    tensors = {"a": {"requested": "F32", "actual": "F32", "weights": 1}}
    assert substitutions(tensors) == []


class Tampered:
    """The ONNX container, one of whose tensors reads back changed."""

    def __init__(self, change):
        self.container = load_container("onnx")
        self.change = change
        self.expected = self.container.expected

    def read_back(self, folder, source):
        stored = self.container.read_back(folder, source)
        tensor = self.change(stored.pop(NAME))
        return stored if tensor is None else stored | {NAME: tensor}


def nan_everywhere(tensor):
    values = np.full(tensor.shape, np.nan, np.float32)
    return replace(tensor, dequantize=lambda: values)


def one_value_changed(tensor):
    values = tensor.dequantize()
    values[3, 5] += 1e-6
    return replace(tensor, dequantize=lambda: values)


def absent(tensor):
    return None


def transposed(tensor):
    return replace(tensor, shape=tensor.shape[::-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (absent, "in the container, found no such tensor"),
        (transposed, r"to be \(256, 512\), found \(512, 256\)"),
        (one_value_changed, "reads back with other values than were written"),
        (nan_everywhere, "reads back with other values than were written"),
    ],
)
def test_check_container_refuses_other_contents(three_bits, change, words):
    with pytest.raises(StageError, match=words) as caught:
        check(three_bits, Tampered(change))
    assert caught.value.failure == Failure.READBACK_MISMATCH
    assert NAME in str(caught.value)
