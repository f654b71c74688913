"""Sixteen float32 side by side as one value in compiled code: a SIMD vector.

With it, vectorizing a loop is not left to the compiler. Every operation is that of IEEE 754 on each
element: no reordering, no fused multiply-add, the same on every processor.

numba caches what it has compiled by the file of the outermost function alone: after an edit of a
file that such a function calls into, delete the __pycache__ beside it.
"""

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

VECTOR_WIDTH = 16
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, VECTOR_WIDTH)
INTEGERS = ir.VectorType(ir.IntType(32), VECTOR_WIDTH)

Vector = Any  # for annotations: sixteen float32 as one value, inside compiled code

# How functions on vectors are compiled. Division by zero gives what IEEE 754 says.
compiled = numba.njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


class VectorType(types.Type):
    """numba's type of a vector."""

    def __init__(self) -> None:
        """Name the type."""
        super().__init__(name="Vector16")


VECTOR_TYPE = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    """How LLVM holds a vector: in one register, or several."""

    def __init__(self, manager: Any, numba_type: VectorType) -> None:
        super().__init__(manager, numba_type, FLOATS)


def _broadcast(builder: Any, value: Any) -> Any:
    """Put a float32 into all elements."""
    first = ir.Constant(ir.IntType(32), 0)
    single = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, first)
    everywhere = ir.Constant(INTEGERS, [0] * VECTOR_WIDTH)
    return builder.shuffle_vector(single, ir.Constant(FLOATS, ir.Undefined), everywhere)


def _float_constant(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [float(value)] * VECTOR_WIDTH)


def _integer_constant(value: int) -> ir.Constant:
    return ir.Constant(INTEGERS, [value] * VECTOR_WIDTH)


def _as_vector(builder: Any, value: Any, numba_type: types.Type) -> Any:
    """Return a vector as it is, and a float32 as a vector."""
    return value if isinstance(numba_type, VectorType) else _broadcast(builder, value)


def _have_vector(*numba_types: types.Type) -> bool:
    """Whether some of the types are vectors, and all others float32."""
    vectors = [isinstance(numba_type, VectorType) for numba_type in numba_types]
    floats = [numba_type == types.float32 for numba_type in numba_types]
    fit = all(is_vector or is_float for is_vector, is_float in zip(vectors, floats, strict=True))
    return fit and any(vectors)


def _overload_operator(operation: Callable[..., Any], instruction: str) -> None:
    """Let one of Python's operators work on vectors and float32."""

    @intrinsic
    def call(typing_context: Any, left: Any, right: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            first = _as_vector(builder, values[0], signature.args[0])
            second = _as_vector(builder, values[1], signature.args[1])
            return getattr(builder, instruction)(first, second)

        return VECTOR_TYPE(left, right), generate

    def implementation(left: Any, right: Any) -> Any:
        return call(left, right)

    @overload(operation)
    def choose(left: Any, right: Any) -> Any:
        return implementation if _have_vector(left, right) else None


_overload_operator(operator.add, "fadd")
_overload_operator(operator.sub, "fsub")
_overload_operator(operator.mul, "fmul")
_overload_operator(operator.truediv, "fdiv")


def _call(builder: Any, name: str, value: Any) -> Any:
    """Call one of LLVM's functions on a vector."""
    function_type = ir.FunctionType(FLOATS, [FLOATS])
    mangled = f"{name}.v{VECTOR_WIDTH}f32"
    function = cgutils.get_or_insert_function(builder.module, function_type, mangled)
    return builder.call(function, [value])


def _unary(name: str) -> Any:
    """Make one of LLVM's functions of one vector callable in compiled code."""

    @intrinsic
    def call(typing_context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return _call(builder, name, values[0])

        return (VECTOR_TYPE(value), generate) if _have_vector(value) else None

    return call


round_to_even = _unary("llvm.rint")
square_root = _unary("llvm.sqrt")
absolute = _unary("llvm.fabs")


def _selection(comparison: str) -> Any:
    """Make a choice between two values, element by element, callable in compiled code."""

    @intrinsic
    def call(typing_context: Any, left: Any, right: Any, yes: Any, no: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            vectors = [
                _as_vector(builder, value, numba_type)
                for value, numba_type in zip(values, signature.args, strict=True)
            ]
            mask = builder.fcmp_ordered(comparison, vectors[0], vectors[1])
            return builder.select(mask, vectors[2], vectors[3])

        return VECTOR_TYPE(left, right, yes, no), generate

    return call


# select_less(a, b, yes, no): yes where a < b, else, also where one is NaN, no
select_less = _selection("<")
select_equal = _selection("==")


@intrinsic
def any_less(typing_context: Any, left: Any, right: Any) -> Any:
    """Return whether left < right in any element."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        mask = builder.bitcast(builder.fcmp_ordered("<", *values), ir.IntType(VECTOR_WIDTH))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(left, right), generate


@intrinsic
def clip(typing_context: Any, value: Any, low: Any, high: Any) -> Any:
    """Return max(low, min(high, value)) for float32 bounds."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        clipped = values[0]
        least = _broadcast(builder, values[1])
        most = _broadcast(builder, values[2])
        clipped = builder.select(builder.fcmp_ordered("<", clipped, most), clipped, most)
        return builder.select(builder.fcmp_ordered(">", clipped, least), clipped, least)

    floats = low == types.float32 and high == types.float32
    return (VECTOR_TYPE(value, low, high), generate) if floats else None


@intrinsic
def round_to_float16(typing_context: Any, value: Any) -> Any:
    """Round each element to what float16 holds, ties to even; infinite beyond its range."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        single = values[0]
        # Thirteen bits of the significand are rounded away, in integer arithmetic.
        bits = builder.bitcast(single, INTEGERS)
        odd = builder.and_(builder.lshr(bits, _integer_constant(13)), _integer_constant(1))
        raised = builder.add(builder.add(bits, _integer_constant(0xFFF)), odd)
        normal = builder.bitcast(builder.and_(raised, _integer_constant(-0x2000)), FLOATS)
        # Subnormal numbers of float16 are multiples of 2⁻²⁴.
        multiple = _call(builder, "llvm.rint", builder.fmul(single, _float_constant(2.0**24)))
        subnormal = builder.fmul(multiple, _float_constant(2.0**-24))
        size = _call(builder, "llvm.fabs", single)
        is_subnormal = builder.fcmp_ordered("<", size, _float_constant(2.0**-14))
        rounded_size = _call(builder, "llvm.fabs", normal)
        is_infinite = builder.fcmp_ordered(">", rounded_size, _float_constant(65504.0))
        infinite = builder.fmul(single, _float_constant(np.inf))
        finite = builder.select(is_subnormal, subnormal, normal)
        return builder.select(is_infinite, infinite, finite)

    return VECTOR_TYPE(value), generate


@intrinsic
def broadcast(typing_context: Any, value: Any) -> Any:
    """Return a float32 in all elements."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _broadcast(builder, values[0])

    return (VECTOR_TYPE(value), generate) if value == types.float32 else None


def _address(context: Any, builder: Any, numba_type: Any, array: Any, row: Any) -> Any:
    """Return the address of a row of a C-contiguous float32 array [rows, VECTOR_WIDTH]."""
    data = cgutils.create_struct_proxy(numba_type)(context, builder, value=array).data
    offset = builder.mul(row, ir.Constant(row.type, VECTOR_WIDTH))
    return builder.bitcast(builder.gep(data, [offset]), FLOATS.as_pointer())


@intrinsic
def load(typing_context: Any, array: Any, row: Any) -> Any:
    """Read a row of a float32 array [rows, VECTOR_WIDTH]; the index is not checked."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _address(context, builder, signature.args[0], values[0], values[1])
        return builder.load(address, align=4)

    return VECTOR_TYPE(array, types.intp), generate


@intrinsic
def store(typing_context: Any, array: Any, row: Any, value: Any) -> Any:
    """Write a row of a float32 array [rows, VECTOR_WIDTH]; the index is not checked."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        address = _address(context, builder, signature.args[0], values[0], values[1])
        builder.store(_as_vector(builder, values[2], signature.args[2]), address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate
