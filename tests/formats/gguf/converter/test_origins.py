"""Tensors of a converter's file, found in the checkpoint by their rows."""

import numpy as np
import pytest

from quantline.formats.gguf.converter import origins

GENERATOR = np.random.default_rng(0)
LAYERS = {
    f"block.{name}": GENERATOR.standard_normal(shape).astype(np.float32)
    for name, shape in {
        "q": (8, 16),
        "k": (4, 16),
        "gate_up": (24, 16),
        "down": (16, 12),
        "experts.0.up": (6, 16),
        "experts.1.up": (6, 16),
    }.items()
}


class Source:
    """Matrices by their layer's name."""

    def __init__(self, layers: dict[str, np.ndarray]) -> None:
        self.layers = {f"{name}.weight": values for name, values in layers.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layers[name].shape

    def tensor(self, name: str) -> np.ndarray:
        return self.layers[name]


def origin(matrix: np.ndarray, layers: dict[str, np.ndarray] = LAYERS, taken=None):
    source = Source(layers)
    weights = origins._Weights(source, list(source.layers))
    return weights.origin(matrix, set() if taken is None else taken)


def whole(layer: str) -> dict:
    return {"layer": layer, "whole": True}


def part(layer: str) -> dict:
    return {"layer": layer, "whole": False}


CASES = {
    "the same": (LAYERS["block.down"], whole("block.down")),
    "other rows first": (LAYERS["block.q"][::-1], whole("block.q")),
    "an expert": (LAYERS["block.experts.1.up"], whole("block.experts.1.up")),
    "one half": (LAYERS["block.gate_up"][12:], part("block.gate_up")),
    "two in one": (np.concatenate([LAYERS["block.q"], LAYERS["block.k"]]), part("block.q")),
    "scaled": (LAYERS["block.q"] * 2, None),
    "transposed": (LAYERS["block.down"].T.copy(), None),
    "one row of its own": (
        np.concatenate([LAYERS["block.q"][:7], np.ones((1, 16), np.float32)]),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_origin_of_a_matrix_that_is(case):
    matrix, expected = CASES[case]
    assert origin(matrix) == expected


def test_origin_finds_columns_in_another_order():
    down = LAYERS["block.down"]
    columns = np.random.default_rng(1).permutation(12)
    found = origin(np.ascontiguousarray(down[:, columns]))
    assert found == {"layer": "block.down", "whole": False, "columns": columns.tolist()}


def test_origin_gives_equal_layers_to_equal_matrices_in_turn():
    equal = np.ones((4, 8), np.float32)
    taken: set[str] = set()
    layers = {"a": equal, "b": equal}
    assert [origin(equal, layers, taken)["layer"] for _ in range(2)] == ["a", "b"]


def test_row_digests_differ_for_rows_with_the_same_sum():
    rows = np.array([[1, 2], [2, 1], [1, 2]], np.float32)
    first, second, third = origins.row_digests(rows)
    assert first == third != second
