"""Canonical integers as ONNX nodes, and back.

Groups become com.microsoft's MatMulNBits (onnxruntime, docs/ContribOperators.md), which computes in float32 here: its
accuracy_level is left unset. int8 by the row becomes DynamicQuantizeLinear and MatMulInteger, which onnxruntime fuses;
its weights are unsigned around 128, because processors without VNNI saturate on signed ones.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from quantline.quantized.store import GroupedLinear
from quantline.errors import Failure, StageError

BLOCKS = (256, 128, 64, 32, 16)  # block sizes that MatMulNBits has
PARTS = PACKED, INTEGERS, SCALE, ZERO = "weight_packed", "weight_int8", "weight_scale", "weight_zero_point"

Made = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]  # nodes, and the tensors that they read


def slot_bits(bits: int) -> int:
    """MatMulNBits has 2, 4 and 8 bits; integers of 3 bits lie in slots of 4."""
    return 4 if bits == 3 else bits


def nodes_of(name: str, linear: GroupedLinear, x: str, y: str) -> Made:
    """Nodes that compute y from x with the integers of the layer `name`. Raises StageError(unsupported_width)."""
    whole = linear.bits == 8 and linear.symmetric and linear.group_size == linear.integers.shape[1]
    return dynamic_int8(name, linear, x, y) if whole else matmul_nbits(name, linear, x, y)


def matmul_nbits(name: str, linear: GroupedLinear, x: str, y: str) -> Made:
    """One MatMulNBits node. Groups that are no block size are cut into blocks that share a scale.

    A grid of fewer bits than the slot keeps its integers and zero points; both are simply small numbers there.
    Zero points are left out where they are what the node assumes: the middle of the slot.
    """
    rows, columns = linear.integers.shape
    bits = slot_bits(linear.bits)
    block = next((size for size in BLOCKS if linear.group_size % size == 0), None)
    if block is None:
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"{name} has groups of {linear.group_size} weights, which MatMulNBits' "
                                                    f"smallest block of {BLOCKS[-1]} does not divide; use group_size 32")
    repeat = linear.group_size // block
    tensors = {f"{name}.{PACKED}": pack(linear.integers.reshape(-1, block), bits).reshape(rows, columns // block, -1),
               f"{name}.{SCALE}": np.repeat(linear.scales, repeat, 1)}
    if not (linear.zeros == 1 << (bits - 1)).all():
        tensors[f"{name}.{ZERO}"] = pack(np.repeat(linear.zeros, repeat, 1), bits)
    node = helper.make_node("MatMulNBits", [x, *tensors], [y], name=name, domain="com.microsoft", K=columns, N=rows,
                            bits=bits, block_size=block)
    return [node], tensors


def dynamic_int8(name: str, linear: GroupedLinear, x: str, y: str) -> Made:
    """Activations quantized per tensor at run time, integer product, one scale per output channel."""
    tensors = {f"{name}.{INTEGERS}": np.ascontiguousarray(linear.integers.T),
               f"{name}.{SCALE}": linear.scales.reshape(-1), f"{name}.{ZERO}": np.array(128, np.uint8)}
    weight, scale, zero = tensors
    return [
        helper.make_node("DynamicQuantizeLinear", [x], [f"{name}.x", f"{name}.x_scale", f"{name}.x_zero"],
                         name=f"{name}.quantize"),
        helper.make_node("MatMulInteger", [f"{name}.x", weight, f"{name}.x_zero", zero], [f"{name}.sum"], name=name),
        helper.make_node("Cast", [f"{name}.sum"], [f"{name}.float"], name=f"{name}.cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.x_scale", scale], [f"{name}.scale"], name=f"{name}.scales"),
        helper.make_node("Mul", [f"{name}.float", f"{name}.scale"], [y], name=f"{name}.rescale"),
    ], tensors


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, n] → uint8 [rows, ceil(n · bits / 8)], lowest bits first."""
    per_byte = 8 // bits
    padded = np.zeros((len(values), -(-values.shape[1] // per_byte) * per_byte), np.uint8)
    padded[:, :values.shape[1]] = values
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return np.bitwise_or.reduce(padded.reshape(len(values), -1, per_byte) << shifts, axis=-1)


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: float32 [rows, count]."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    values = (data[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return values.reshape(len(data), -1)[:, :count].astype(np.float32)


def dequantize(node: onnx.NodeProto, parts: dict[str, np.ndarray]) -> np.ndarray:
    """The weight float32 [out, in] that a node stands for; `parts` are its tensors, by PACKED, SCALE and so on."""
    if node.op_type == "MatMulInteger":
        return (parts[INTEGERS].T.astype(np.float32) - np.float32(parts[ZERO])) * parts[SCALE][:, None]
    rows, columns, bits, block = (attributes(node)[key] for key in ("N", "K", "bits", "block_size"))
    grouped = unpack(parts[PACKED].reshape(rows * (columns // block), -1), bits, block).reshape(rows, -1, block)
    zeros = unpack(parts[ZERO], bits, columns // block)[:, :, None] if ZERO in parts else np.float32(1 << (bits - 1))
    return ((grouped - zeros) * parts[SCALE][:, :, None]).reshape(rows, columns)


def attributes(node: onnx.NodeProto) -> dict[str, int]:
    """A node's integer attributes."""
    return {one.name: one.i for one in node.attribute}
