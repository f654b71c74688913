"""Sixteen float32 side by side as one value in compiled code, so that a loop over them is not left to the compiler.

Every operation is that of IEEE 754 on each lane: no reordering, no fused multiply-add, the same on every processor.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
FLOAT = ir.FloatType()
VECTOR, WHOLES = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(32), LANES)


class Lanes(types.Type):
    """The type of such a value."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


LANES_TYPE = Lanes()


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, VECTOR)


def _spread(builder, value):
    """A float32 in all lanes."""
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(VECTOR, ir.Undefined), ir.Constant(WHOLES, [0] * LANES))


def _constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [float(value)] * LANES)


def _wholes(value: int) -> ir.Constant:
    return ir.Constant(WHOLES, [value] * LANES)


def _lifted(builder, value, kind):
    """A value of either type as lanes."""
    return value if isinstance(kind, Lanes) else _spread(builder, value)


def _fit(*kinds: types.Type) -> bool:
    return any(isinstance(kind, Lanes) for kind in kinds) and all(
        isinstance(kind, Lanes) or kind == types.float32 for kind in kinds)


def _binary(operation, instruction: str) -> None:
    """Let a Python operator work on lanes and float32."""

    @intrinsic
    def call(typing_context, left, right):
        def generate(context, builder, signature, values):
            return getattr(builder, instruction)(*(_lifted(builder, value, kind) for value, kind in
                                                   zip(values, signature.args, strict=True)))
        return LANES_TYPE(left, right), generate

    @overload(operation)
    def over(left, right):
        return (lambda left, right: call(left, right)) if _fit(left, right) else None


for _operation, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"),
                                 (operator.truediv, "fdiv")):
    _binary(_operation, _instruction)


def _call(builder, name: str, value):
    """One of LLVM's functions on a vector."""
    kind = ir.FunctionType(VECTOR, [VECTOR])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{LANES}f32"), [value])


def _unary(name: str):
    @intrinsic
    def call(typing_context, value):
        def generate(context, builder, signature, values):
            return _call(builder, name, values[0])
        return (LANES_TYPE(value), generate) if _fit(value) else None
    return call


nearest_whole, root, size = _unary("llvm.rint"), _unary("llvm.sqrt"), _unary("llvm.fabs")


def _choice(comparison: str):
    @intrinsic
    def call(typing_context, left, right, yes, no):
        def generate(context, builder, signature, values):
            left, right, yes, no = (_lifted(builder, value, kind) for value, kind in
                                    zip(values, signature.args, strict=True))
            return builder.select(builder.fcmp_ordered(comparison, left, right), yes, no)
        return LANES_TYPE(left, right, yes, no), generate
    return call


if_less = _choice("<")  # if_less(a, b, yes, no): yes where a < b, else, also for NaN, no
if_equal = _choice("==")


@intrinsic
def any_less(typing_context, left, right):
    """Whether left < right in any lane."""
    def generate(context, builder, signature, values):
        mask = builder.bitcast(builder.fcmp_ordered("<", *values), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))
    return types.boolean(left, right), generate


@intrinsic
def clipped(typing_context, value, low, high):
    """max(low, min(high, value)) for float32 bounds."""
    def generate(context, builder, signature, values):
        value, low, high = values[0], *(_spread(builder, one) for one in values[1:])
        value = builder.select(builder.fcmp_ordered("<", value, high), value, high)
        return builder.select(builder.fcmp_ordered(">", value, low), value, low)
    return (LANES_TYPE(value, low, high), generate) if (low, high) == (types.float32, types.float32) else None


@intrinsic
def as_half(typing_context, value):
    """Each lane rounded to what float16 holds, ties to even; infinite beyond its range."""
    def generate(context, builder, signature, values):
        value = values[0]
        bits = builder.bitcast(value, WHOLES)
        odd = builder.and_(builder.lshr(bits, _wholes(13)), _wholes(1))
        raised = builder.add(builder.add(bits, _wholes(0xFFF)), odd)
        normal = builder.bitcast(builder.and_(raised, _wholes(-0x2000)), VECTOR)
        whole = _call(builder, "llvm.rint", builder.fmul(value, _constant(2.0**24)))
        small = builder.fmul(whole, _constant(2.0**-24))
        tiny = builder.fcmp_ordered("<", _call(builder, "llvm.fabs", value), _constant(2.0**-14))
        beyond = builder.fcmp_ordered(">", _call(builder, "llvm.fabs", normal), _constant(65504.0))
        far = builder.fmul(value, _constant(np.inf))
        return builder.select(beyond, far, builder.select(tiny, small, normal))
    return LANES_TYPE(value), generate


@intrinsic
def spread(typing_context, value):
    """A float32 in all lanes."""
    def generate(context, builder, signature, values):
        return _spread(builder, values[0])
    return (LANES_TYPE(value), generate) if value == types.float32 else None


def _address(context, builder, kind, array, row):
    """Where a row of a C-contiguous float32 array [rows, LANES] lies."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [builder.mul(row, ir.Constant(row.type, LANES))]), VECTOR.as_pointer())


@intrinsic
def get(typing_context, array, row):
    """The lanes of a row of a float32 array [rows, LANES]; the index is not checked."""
    def generate(context, builder, signature, values):
        return builder.load(_address(context, builder, signature.args[0], *values), align=4)
    return LANES_TYPE(array, types.intp), generate


@intrinsic
def put(typing_context, array, row, value):
    """Write lanes to a row of a float32 array [rows, LANES]; the index is not checked."""
    def generate(context, builder, signature, values):
        where = _address(context, builder, signature.args[0], *values[:2])
        builder.store(_lifted(builder, values[2], signature.args[2]), where, align=4)
        return context.get_dummy_value()
    return types.void(array, types.intp, value), generate
