"""ggml's own quantizer on rows of a tensor, in all threads: no model, no file, no 16-bit detour.

There are two kernels: ggml's own, and for the k-quants one of ours (kquant_search.py) that makes
the same blocks several times as fast.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.errors import Failure, StageError
from quantline.methods.ggml.block_types import block_type
from quantline.methods.ggml.blocks import Blocks
from quantline.methods.ggml.method import BlockMethod
from quantline.methods.kquant import KQuantRecipe
from quantline.methods.method import LayerStatistics
from quantline.methods.threads import usual_threads

# Types at which ggml stops the whole process, at an assertion, without an importance matrix.
NEEDS_IMPORTANCE = ("IQ1_S", "IQ2_XXS", "IQ2_XS")
SEARCHED_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # that our kernel has
WIDE_TYPES = ("F32", "BF16")  # which hold whatever float32 does
LARGEST_WEIGHT = 5e5  # that scales in half precision reach: those of Q4_0 up to eight times theirs
UNSAFE_WEIGHT = 1e8  # far beyond it some of ggml's searches stop the process at an assertion
WEIGHTS_AT_ONCE = 1 << 20  # weights in one call, so that the threads share the rows evenly


class KQuant(BlockMethod[KQuantRecipe]):
    """Quantization as llama.cpp does it, with an importance matrix."""

    def quantize(
        self,
        weight: np.ndarray,
        ggml_type: str,
        importance: np.ndarray | None,
        statistics: LayerStatistics | None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Round one tensor with the recipe's kernel; the statistics are not used."""
        kernel = self.recipe.search_kernel
        return quantize_blocks(weight, ggml_type, importance, kernel=kernel), {}


@cache
def _ggml_library() -> ctypes.CDLL:
    """Load libggml-base of llama-cpp-python without importing the package."""
    spec = find_spec("llama_cpp")
    path = Path("llama_cpp")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / "lib" / "libggml-base.so"
    if not path.is_file():
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            "expected llama-cpp-python's libggml-base.so; install it: pip install llama-cpp-python",
        )
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def quantize_blocks(
    weight: np.ndarray,
    ggml_type: str,
    importance: np.ndarray | None = None,
    threads: int | None = None,
    kernel: str = "ggml",
) -> np.ndarray:
    """Round a weight to ggml's blocks.

    Rows do not depend on each other, so the number of threads does not change the bytes.

    Args:
        weight: [rows, width] in float32, float16 or bfloat16.
        ggml_type: Any of ggml's types.
        importance: Positive, one number for each input [width]: diag(H) for llama.cpp's importance
            matrix.
        threads: How many rows are rounded side by side; None for as many as usual.
        kernel: With "numba" the types Q2_K to Q6_K are searched by kquant_search.py; all others are
            always made by "ggml".

    Returns:
        uint8 [rows, bytes per row].

    Raises:
        StageError: non_finite; importance_missing, for a type that ggml does not make without;
            importance_invalid; runtime_unavailable, if there is no ggml.
    """
    if importance is None and ggml_type in NEEDS_IMPORTANCE:
        raise StageError(
            Failure.IMPORTANCE_MISSING,
            f"expected an importance matrix, since ggml does not make {ggml_type} without one, "
            "found none; choose another type",
        )
    rows, width = weight.shape
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        # At NaN and infinity ggml stops the whole process, too.
        if not (np.isfinite(importance).all() and (importance >= 0).all()):
            raise StageError(
                Failure.IMPORTANCE_INVALID,
                "expected an importance of each input that is finite and not negative, found NaN, "
                "infinity or a negative number; make the importance matrix again",
            )
    step = max(1, WEIGHTS_AT_ONCE // width)
    use_numba = kernel == "numba" and ggml_type in SEARCHED_TYPES
    quantize_rows = _quantize_by_numba if use_numba else _quantize_by_ggml

    def run(start: int) -> np.ndarray:
        part = as_float32(weight[start : start + step])
        largest = max(float(part.max(initial=0)), -float(part.min(initial=0)))
        if not np.isfinite(part).all():
            raise StageError(
                Failure.NON_FINITE,
                "expected finite numbers, but the weight is not finite; fetch the checkpoint "
                "again, or ask whoever trained it",
            )
        if largest > UNSAFE_WEIGHT and ggml_type not in WIDE_TYPES:
            raise StageError(
                Failure.NON_FINITE,
                f"expected weights of at most {LARGEST_WEIGHT:g}, as ggml's scales are half "
                f"precision, found one of {largest:.3g}; take a recipe for safetensors, or look at "
                "the checkpoint",
            )
        return quantize_rows(part, ggml_type, importance)

    with ThreadPoolExecutor(threads or usual_threads()) as pool:
        return np.concatenate(list(pool.map(run, range(0, rows, step))))


def as_float32(weight: np.ndarray) -> np.ndarray:
    """Return the same values in contiguous float32.

    bfloat16 is the upper half of float32, which numpy shifts without holding Python's lock.
    """
    if weight.dtype != ml_dtypes.bfloat16:
        return np.ascontiguousarray(weight, np.float32)
    bits = np.ascontiguousarray(weight).view(np.uint16).astype(np.uint32)
    return np.left_shift(bits, 16, out=bits).view(np.float32)


def _quantize_by_ggml(
    weight: np.ndarray, ggml_type: str, importance: np.ndarray | None
) -> np.ndarray:
    """Round some rows with ggml."""
    type_id = GGMLQuantizationType[ggml_type]
    rows, width = weight.shape
    library = _ggml_library()
    block_size, block_bytes = GGML_QUANT_SIZES[type_id]
    blocks = np.empty((rows, width // block_size * block_bytes), np.uint8)
    library.ggml_quantize_init(type_id)
    library.ggml_quantize_chunk(
        type_id,
        weight.ctypes.data,
        blocks.ctypes.data,
        0,
        rows,
        width,
        importance.ctypes.data if importance is not None else None,
    )
    return blocks


def _quantize_by_numba(
    weight: np.ndarray, ggml_type: str, importance: np.ndarray | None
) -> np.ndarray:
    """Round some rows with our kernel."""
    from quantline.methods.ggml.kquant_search import search_blocks

    known = block_type(ggml_type)
    size = known.block_size
    count = weight.size // size
    sub_blocks = size // known.sub_block_size
    codes = np.empty((count, size), np.uint8)
    scales = np.empty((count, sub_blocks), np.int16)
    minima = np.empty((count, sub_blocks), np.int16)
    d_and_dmin = np.empty((count, 2), np.float32)
    use_importance = importance is not None
    inputs = np.ones((1, size), np.float32)
    if importance is not None:
        inputs = importance.reshape(-1, size)
    bits = int(ggml_type[1])
    search_blocks(
        weight.reshape(-1, size), inputs, use_importance, bits, codes, scales, minima, d_and_dmin
    )
    halves = d_and_dmin.astype(np.float16)
    d = np.ascontiguousarray(halves[:, :1])
    dmin = np.ascontiguousarray(halves[:, 1:])
    return known.pack(Blocks(codes, scales, minima, d, dmin)).reshape(len(weight), -1)
