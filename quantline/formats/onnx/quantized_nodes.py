"""Grouped integers as ONNX nodes, and back.

A layer becomes com.microsoft's MatMulNBits, and an embedding its GatherBlockQuantized (onnxruntime,
docs/ContribOperators.md); a head that is the embedding reads the same tensors. Products with eight
bits round their inputs to eight bits too, block by block: in float32, onnxruntime's kernels take
thirty times as long for a token. Those with fewer bits are computed in float32.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import helper

from quantline.errors import Failure, StageError
from quantline.formats.onnx.sizes import BLOCK_SIZES, block_size, slot_bits
from quantline.quantized.tensors import GroupedLinear

# What the tensors of a layer are called after its name.
PACKED = "weight_packed"
SCALE = "weight_scale"
ZERO = "weight_zero_point"
PARTS = (PACKED, SCALE, ZERO)

MATMUL = "MatMulNBits"
GATHER = "GatherBlockQuantized"
QUANTIZED_OPERATORS = (MATMUL, GATHER)
DOMAIN = "com.microsoft"
IN_INT8 = 4  # accuracy_level: inputs are rounded to int8


class QuantizedNodes(NamedTuple):
    """A layer in a graph.

    Attributes:
        nodes: In the order of computation.
        tensors: What they read besides the input, by name.
    """

    nodes: list[onnx.NodeProto]
    tensors: dict[str, np.ndarray]


def matmul_nbits(
    name: str, linear: GroupedLinear, x: str, y: str, call: str | None = None
) -> QuantizedNodes:
    """Make one MatMulNBits node.

    Groups that are no block size are cut into blocks that share a scale; where a group is a whole
    row, its last block may reach beyond the row, and what lies there is not read. A grid of fewer
    bits than the slot keeps its integers and zero points; both are simply small numbers there. Zero
    points are left out where they are what the node assumes: the middle of the slot.

    Args:
        name: The layer's module name, which begins the names of its tensors.
        linear: The layer's integers, scales and zero points.
        x: Name of the input in the graph.
        y: Name of the output in the graph.
        call: The node's name, if a model calls the layer more than once.

    Returns:
        The node, and its packed integers, scales and zero points.

    Raises:
        StageError: unsupported_width.
    """
    rows, columns = linear.integers.shape
    bits = slot_bits(linear.bits)
    block = _block_size(name, linear)
    tensors = _tensors(name, linear, bits, block)
    node = helper.make_node(
        MATMUL,
        [x, *tensors],
        [y],
        name=call or name,
        domain=DOMAIN,
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
    )
    if bits == 8:
        node.attribute.append(helper.make_attribute("accuracy_level", IN_INT8))
    return QuantizedNodes([node], tensors)


def gather_block_quantized(
    name: str, linear: GroupedLinear, ids: str, y: str, call: str | None = None
) -> QuantizedNodes:
    """Make the nodes that read rows of an embedding, from the tensors that `matmul_nbits` reads.

    Its blocks lie in an axis of their own, as MatMulNBits wants them. Giving them another shape
    would be one more copy of the embedding in memory.

    Args:
        name: The embedding's module name.
        linear: Symmetric, in groups that are block sizes.
        ids: Name of the tokens in the graph.
        y: Name of the output in the graph.
        call: What begins the names of the nodes, if a model reads the embedding more than once.

    Returns:
        The nodes, and the tensors that they read.
    """
    assert can_gather(linear), "what quantline/recipes/embedding_and_head.py makes"
    call = call or name
    block = _block_size(name, linear)  # as the head has it that reads the same tensors
    tensors = _tensors(name, linear, linear.bits, block)
    packed, scale = tensors
    last = f"{name}.last_axis"
    width = f"{name}.width"
    constants = {last: np.array([-1]), width: np.array([linear.integers.shape[1]])}
    of_blocks = f"{call}.scale_of_blocks"
    blocks = f"{call}.blocks"
    shape = f"{call}.shape_of_ids"
    flat = f"{call}.shape"
    nodes = [
        helper.make_node("Unsqueeze", [scale, last], [of_blocks], name=f"{call}.unsqueeze"),
        helper.make_node(
            GATHER,
            [packed, ids, of_blocks],
            [blocks],
            name=call,
            domain=DOMAIN,
            gather_axis=0,
            quantize_axis=2,
            bits=linear.bits,
            block_size=block,
        ),
        helper.make_node("Shape", [ids], [shape], name=f"{call}.ids"),
        helper.make_node("Concat", [shape, width], [flat], name=f"{call}.concat", axis=0),
        helper.make_node("Reshape", [blocks, flat], [y], name=f"{call}.reshape"),
    ]
    return QuantizedNodes(nodes, tensors | constants)


def can_gather(linear: GroupedLinear) -> bool:
    """Whether GatherBlockQuantized can read rows of a weight from what MatMulNBits reads."""
    in_slots = linear.bits == slot_bits(linear.bits) and linear.bits > 2
    return linear.symmetric and in_slots and linear.group_size in BLOCK_SIZES


def _tensors(name: str, linear: GroupedLinear, bits: int, block: int) -> dict[str, np.ndarray]:
    """Return the packed integers [out, blocks, bytes], scales and zero points of a layer."""
    rows, columns = linear.integers.shape
    blocks = -(-columns // block)
    repeats = blocks // linear.scales.shape[1]
    padded = np.zeros((rows, blocks * block), np.uint8)
    padded[:, :columns] = linear.integers
    packed = pack(padded.reshape(-1, block), bits)
    tensors = {
        f"{name}.{PACKED}": packed.reshape(rows, blocks, -1),
        f"{name}.{SCALE}": _in_16_bits(np.repeat(linear.scales, repeats, 1)),
    }
    if not (linear.zeros == 1 << (bits - 1)).all():
        tensors[f"{name}.{ZERO}"] = pack(np.repeat(linear.zeros, repeats, 1), bits)
    return tensors


def _in_16_bits(scales: np.ndarray) -> np.ndarray:
    """Return scales in bfloat16 if it holds them exactly; those of a quantized source may not."""
    halves = scales.astype(ml_dtypes.bfloat16)
    return halves if (halves.astype(np.float32) == scales).all() else scales


def _block_size(name: str, linear: GroupedLinear) -> int:
    """Return the block size of a layer's node.

    Raises:
        StageError: unsupported_width.
    """
    size = block_size(linear.integers.shape[1], linear.group_size, linear.bits)
    if size is None:
        raise StageError(
            Failure.UNSUPPORTED_WIDTH,
            f"expected groups that MatMulNBits' smallest block of {BLOCK_SIZES[-1]} divides, found "
            f"groups of {linear.group_size} weights in {name}; use group_size 32",
        )
    return size


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


def dequantize(node: onnx.NodeProto, parts: dict[str, np.ndarray], columns: int) -> np.ndarray:
    """Return the weight float32 [out, in] that a node stands for.

    Args:
        node: One of QUANTIZED_OPERATORS.
        parts: Its tensors, by PACKED, SCALE and so on.
        columns: Its inputs.
    """
    attributes = integer_attributes(node)
    bits = attributes["bits"]
    block = attributes["block_size"]
    rows, blocks, _ = parts[PACKED].shape
    integers = unpack(parts[PACKED].reshape(rows * blocks, -1), bits, block)
    zeros: np.ndarray | np.float32 = np.float32(1 << (bits - 1))
    if ZERO in parts:
        zeros = unpack(parts[ZERO], bits, blocks)[:, :, None]
    steps = integers.reshape(rows, blocks, block) - zeros
    scales = parts[SCALE].astype(np.float32)
    return (steps * scales[:, :, None]).reshape(rows, -1)[:, :columns]


def integer_attributes(node: onnx.NodeProto) -> dict[str, int]:
    """Return a node's integer attributes by name."""
    return {attribute.name: attribute.i for attribute in node.attribute}
