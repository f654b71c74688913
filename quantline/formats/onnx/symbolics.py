"""Operations that torch's tracing exporter has no ONNX for, or wrong ones.

They hold only while `registered()` is open.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from onnx import TensorProto
from torch.onnx import (
    register_custom_op_symbolic,
    symbolic_helper,
    symbolic_opset11,
    unregister_custom_op_symbolic,
)

# torch._C.Value and the exporter's GraphContext have no public types.
Value = Any
Graph = Any

OPSET = 18  # the newest that torch's tracing exporter writes without converting
# Below this, exp(x) - 1 has lost too many digits.
SMALL = 0.5


def constant(g: Graph, value: Any, dtype: torch.dtype = torch.int64) -> Value:
    """Return a constant of the graph."""
    return g.op("Constant", value_t=torch.tensor(value, dtype=dtype))


def size_of(g: Graph, x: Value, axis: int) -> Value:
    """Return one size of a tensor, [1]."""
    return g.op("Gather", g.op("Shape", x), constant(g, [axis]), axis_i=0)


def sizes_of(g: Graph, x: Value, first: int, end: int) -> list[Value]:
    """Return the sizes of some axes of a tensor, each [1]."""
    return [size_of(g, x, axis) for axis in range(first, end)]


def rank_of(x: Value) -> int:
    """Return the number of a tensor's axes."""
    rank = symbolic_helper._get_tensor_rank(x)
    assert rank is not None, "a trace knows every rank"
    return int(rank)


def _repeat_interleave(
    g: Graph, x: Value, repeats: Value, dim: Value, output_size: Value = None
) -> Value:
    """Repeat each item of an axis so many times; torch's own fails on tensors of two axes and more.

    Interleaved rotary embeddings do it, and heads that are shared.
    """
    times = int(symbolic_helper._maybe_get_const(repeats, "i"))
    axis = int(symbolic_helper._maybe_get_const(dim, "i"))
    rank = rank_of(x)
    axis %= rank
    apart = g.op("Unsqueeze", x, constant(g, [axis + 1]))
    tiled = g.op(
        "Tile", apart, constant(g, [times if n == axis + 1 else 1 for n in range(rank + 1)])
    )
    together = g.op("Mul", size_of(g, x, axis), constant(g, [times]))
    shape = [*sizes_of(g, x, 0, axis), together, *sizes_of(g, x, axis + 1, rank)]
    return g.op("Reshape", tiled, g.op("Concat", *shape, axis_i=0))


def _expm1(g: Graph, x: Value) -> Value:
    """Compute exp(x) - 1, near zero by t = tanh(x / 2), of which it is 2 t / (1 - t)."""
    one = constant(g, 1.0, torch.float32)
    two = constant(g, 2.0, torch.float32)
    near = g.op("Less", g.op("Abs", x), constant(g, SMALL, torch.float32))
    zero = constant(g, 0.0, torch.float32)
    t = g.op("Tanh", g.op("Div", g.op("Where", near, x, zero), two))
    exact = g.op("Div", g.op("Mul", two, t), g.op("Sub", one, t))
    return g.op("Where", near, exact, g.op("Sub", g.op("Exp", x), one))


def _rms_norm(g: Graph, x: Value, shape: Value, weight: Value, epsilon: Value) -> Value:
    """Divide by sqrt(mean(x²) + epsilon), over as many of the last axes as `shape` has."""
    count = len(symbolic_helper._maybe_get_const(shape, "is"))
    axes = constant(g, list(range(-count, 0)))
    added = torch.finfo(torch.float32).eps
    if not symbolic_helper._is_none(epsilon):
        added = symbolic_helper._maybe_get_const(epsilon, "f")
    mean = g.op("ReduceMean", g.op("Mul", x, x), axes, keepdims_i=1)
    root = g.op("Sqrt", g.op("Add", mean, constant(g, added, torch.float32)))
    scaled = g.op("Div", x, root)
    return scaled if symbolic_helper._is_none(weight) else g.op("Mul", scaled, weight)


def _copy(g: Graph, x: Value, source: Value, non_blocking: Value = None) -> Value:
    """Overwrite a tensor: what is there afterwards is the other one, in its shape."""
    return g.op("Expand", source, g.op("Shape", x))


def _flatten(g: Graph, x: Value, start: Value, end: Value) -> Value:
    """Merge axes without asking ONNX for a size, which it cannot tell for a tensor without rows.

    An expert that no token is sent to has none.
    """
    rank = rank_of(x)
    first = int(symbolic_helper._maybe_get_const(start, "i")) % rank
    last = int(symbolic_helper._maybe_get_const(end, "i")) % rank
    merged = g.op("Slice", g.op("Shape", x), constant(g, [first]), constant(g, [last + 1]))
    together = g.op("ReduceProd", merged, constant(g, [0]), keepdims_i=1)
    shape = [*sizes_of(g, x, 0, first), together, *sizes_of(g, x, last + 1, rank)]
    return g.op("Reshape", x, g.op("Concat", *shape, axis_i=0), allowzero_i=1)


def _cumsum(g: Graph, x: Value, dim: Value, dtype: Value = None) -> Value:
    """Sum along an axis; torch counts what is true, which ONNX has no sum of."""
    if symbolic_helper._is_bool(x):
        x = g.op("Cast", x, to_i=TensorProto.INT64)
    return symbolic_opset11.cumsum(g, x, dim, dtype)


SYMBOLICS: dict[str, Callable[..., Value]] = {
    "aten::repeat_interleave": _repeat_interleave,
    "aten::expm1": _expm1,
    "aten::special_expm1": _expm1,
    "aten::rms_norm": _rms_norm,
    "aten::copy": _copy,
    "aten::cumsum": _cumsum,
    "aten::flatten": _flatten,
}


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Let torch's tracing exporter use these."""
    for name, symbolic in SYMBOLICS.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in SYMBOLICS:
            unregister_custom_op_symbolic(name, OPSET)
