"""Grouped integers as ONNX nodes, and back.

Groups become com.microsoft's MatMulNBits (onnxruntime, docs/ContribOperators.md), which computes in
float32 here: its accuracy_level is left unset. int8 by the row becomes DynamicQuantizeLinear and
MatMulInteger, which onnxruntime fuses; its weights are unsigned around 128, because processors
without VNNI saturate on signed ones.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantline.errors import Failure, StageError
from quantline.quantized.tensors import GroupedLinear

BLOCK_SIZES = (256, 128, 64, 32, 16)  # that MatMulNBits has
# What the tensors of a layer are called after its name.
PACKED = "weight_packed"
INTEGERS = "weight_int8"
SCALE = "weight_scale"
ZERO = "weight_zero_point"
PARTS = (PACKED, INTEGERS, SCALE, ZERO)
INT8_ZERO = 128

QUANTIZED_OPERATORS = ("MatMulNBits", "MatMulInteger")
DOMAIN = "com.microsoft"


class QuantizedNodes(NamedTuple):
    """A layer in a graph.

    Attributes:
        nodes: In the order of computation.
        tensors: What they read besides the input, by name.
    """

    nodes: list[onnx.NodeProto]
    tensors: dict[str, np.ndarray]


def slot_bits(bits: int) -> int:
    """Return the bits that an integer takes in MatMulNBits, which has 2, 4 and 8."""
    return 4 if bits == 3 else bits


def quantized_nodes(
    name: str, linear: GroupedLinear, x: str, y: str, call: str | None = None
) -> QuantizedNodes:
    """Make the nodes of a layer: int8 by the row becomes `dynamic_int8`, all else `matmul_nbits`.

    Args:
        name: The layer's module name, which begins the names of its nodes and tensors.
        linear: The layer's integers, scales and zero points.
        x: Name of the input in the graph.
        y: Name of the output in the graph.
        call: What begins the names of the nodes, if a model calls the layer more than once.

    Returns:
        The nodes that compute y from x, and the tensors that they read.

    Raises:
        StageError: unsupported_width.
    """
    per_row = linear.group_size == linear.integers.shape[1]
    if linear.bits == 8 and linear.symmetric and per_row:
        return dynamic_int8(name, linear, x, y, call or name)
    return matmul_nbits(name, linear, x, y, call or name)


def matmul_nbits(name: str, linear: GroupedLinear, x: str, y: str, call: str) -> QuantizedNodes:
    """Make one MatMulNBits node.

    Groups that are no block size are cut into blocks that share a scale; where a group is a whole
    row, its last block may reach beyond the row, and what lies there is not read. A grid of fewer
    bits than the slot keeps its integers and zero points; both are simply small numbers there. Zero
    points are left out where they are what the node assumes: the middle of the slot.

    Args:
        name: The layer's module name.
        linear: The layer's integers, scales and zero points.
        x: Name of the input in the graph.
        y: Name of the output in the graph.
        call: The node's name.

    Returns:
        The node, and its packed integers, scales and zero points.

    Raises:
        StageError: unsupported_width.
    """
    rows, columns = linear.integers.shape
    bits = slot_bits(linear.bits)
    block_size = _block_size(name, linear)
    blocks = -(-columns // block_size)
    repeats = blocks // linear.scales.shape[1]
    padded = np.zeros((rows, blocks * block_size), np.uint8)
    padded[:, :columns] = linear.integers
    packed = pack(padded.reshape(-1, block_size), bits)
    tensors = {
        f"{name}.{PACKED}": packed.reshape(rows, blocks, -1),
        f"{name}.{SCALE}": np.repeat(linear.scales, repeats, 1),
    }
    if not (linear.zeros == 1 << (bits - 1)).all():
        tensors[f"{name}.{ZERO}"] = pack(np.repeat(linear.zeros, repeats, 1), bits)
    node = helper.make_node(
        "MatMulNBits",
        [x, *tensors],
        [y],
        name=call,
        domain=DOMAIN,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block_size,
    )
    return QuantizedNodes([node], tensors)


def _block_size(name: str, linear: GroupedLinear) -> int:
    """Return the largest block that groups consist of, or that wastes least of a whole row.

    Raises:
        StageError: unsupported_width.
    """
    size = linear.group_size
    fitting = [block for block in BLOCK_SIZES if size % block == 0]
    if fitting:
        return fitting[0]
    if size != linear.integers.shape[1]:
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            f"expected groups that MatMulNBits' smallest block of {BLOCK_SIZES[-1]} divides, found "
            f"groups of {size} weights in {name}; use group_size 32",
        )
    return min(BLOCK_SIZES, key=lambda block: -size % block)


def dynamic_int8(name: str, linear: GroupedLinear, x: str, y: str, call: str) -> QuantizedNodes:
    """Make nodes that round activations per tensor at run time and multiply integers.

    There is one scale per output channel.

    Args:
        name: The layer's module name.
        linear: Eight bits, symmetric, one group per row.
        x: Name of the input in the graph.
        y: Name of the output in the graph.
        call: What begins the nodes' names.

    Returns:
        The nodes, and the integers, scales and zero point that they read.
    """
    weight = f"{name}.{INTEGERS}"
    scale = f"{name}.{SCALE}"
    zero = f"{name}.{ZERO}"
    tensors = {
        weight: np.ascontiguousarray(linear.integers.T),
        scale: linear.scales.reshape(-1),
        zero: np.array(INT8_ZERO, np.uint8),
    }
    x_parts = [f"{call}.x", f"{call}.x_scale", f"{call}.x_zero"]
    quantized, x_scale, x_zero = x_parts
    product = f"{call}.sum"
    as_float = f"{call}.float"
    both_scales = f"{call}.scale"
    nodes = [
        helper.make_node("DynamicQuantizeLinear", [x], x_parts, name=f"{call}.quantize"),
        helper.make_node("MatMulInteger", [quantized, weight, x_zero, zero], [product], name=call),
        helper.make_node("Cast", [product], [as_float], name=f"{call}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [x_scale, scale], [both_scales], name=f"{call}.scales"),
        helper.make_node("Mul", [as_float, both_scales], [y], name=f"{call}.rescale"),
    ]
    return QuantizedNodes(nodes, tensors)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [rows, n] into uint8 [rows, ceil(n · bits / 8)], lowest bits first."""
    rows, count = values.shape
    per_byte = 8 // bits
    padded = np.zeros((rows, -(-count // per_byte) * per_byte), np.uint8)
    padded[:, :count] = values
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(padded.reshape(rows, -1, per_byte) << shifts, axis=-1)


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `pack`; return float32 [rows, count]."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    values = (data[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(len(data), -1)[:, :count].astype(np.float32)


def dequantize(node: onnx.NodeProto, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Return the weight float32 [out, in] that a node stands for.

    Args:
        node: A MatMulNBits or a MatMulInteger.
        parts: Its tensors, by PACKED, SCALE and so on.
    """
    if node.op_type == "MatMulInteger":
        steps = parts[INTEGERS].T.astype(np.float32) - np.float32(parts[ZERO])
        return steps * parts[SCALE][:, None]
    attributes = integer_attributes(node)
    rows = attributes["N"]
    columns = attributes["K"]
    bits = attributes["bits"]
    block_size = attributes["block_size"]
    blocks = -(-columns // block_size)
    integers = unpack(parts[PACKED].reshape(rows * blocks, -1), bits, block_size)
    zeros: np.ndarray | np.float32 = np.float32(1 << (bits - 1))
    if ZERO in parts:
        zeros = unpack(parts[ZERO], bits, blocks)[:, :, None]
    steps = integers.reshape(rows, -1, block_size) - zeros
    return (steps * parts[SCALE][:, :, None]).reshape(rows, -1)[:, :columns]


def integer_attributes(node: onnx.NodeProto) -> dict[str, int]:
    """Return a node's integer attributes by name."""
    return {attribute.name: attribute.i for attribute in node.attribute}
