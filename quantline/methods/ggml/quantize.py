"""ggml's quantizer on blocks of rows in all threads: no model, no file, no 16-bit detour.

There are two kernels: ggml's own, and for the k-quants one of ours that makes the same choices several times as fast.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.errors import Failure, StageError

WITHOUT_IT_GGML_STOPS = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # with the whole process, at an assertion
WEIGHTS_AT_ONCE = 1 << 20  # weights in one call, so that the threads share the work evenly
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # the types that our kernel has


@cache
def _library() -> ctypes.CDLL:
    """libggml-base of llama-cpp-python, loaded without importing the package."""
    spec = find_spec("llama_cpp")
    path = Path(spec.submodule_search_locations[0]) / "lib" / "libggml-base.so" if spec else Path("llama_cpp")
    if not path.is_file():
        raise StageError(Failure.RUNTIME_UNAVAILABLE, "expected llama-cpp-python's libggml-base.so; "
                                                      "install it: pip install llama-cpp-python")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64,
                                            ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    return library


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray | None = None, threads: int | None = None,
             kernel: str = "ggml") -> np.ndarray:
    """ggml blocks uint8 [rows, bytes per row] of a weight [rows, width] in float32, float16 or bfloat16.

    `importance` [width] is positive, one weight per input: diag(H) for llama.cpp's importance matrix. Rows do not
    depend on each other, so the number of threads does not show in the bytes. With the kernel numba the types Q2_K to
    Q6_K are searched by kquant_search.py; the others are always ggml's.
    Raises StageError: non_finite, importance_missing for a type that ggml does not make without.
    """
    if importance is None and kind in WITHOUT_IT_GGML_STOPS:
        raise StageError(Failure.IMPORTANCE_MISSING, f"expected an importance matrix, since ggml does not make {kind} "
                                                     "without one, found none; choose another type")
    rows, width = weight.shape
    factors = None if importance is None else np.ascontiguousarray(importance, np.float32)
    step = max(1, WEIGHTS_AT_ONCE // width)
    run = _in_lanes if kernel == "numba" and kind in SEARCHED else _by_ggml

    def part(start: int) -> np.ndarray:
        source = as_float32(weight[start:start + step])
        if not np.isfinite(source).all():
            raise StageError(Failure.NON_FINITE, "the weight is not finite")
        return run(source, kind, factors)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(part, range(0, rows, step))))


def as_float32(weight: np.ndarray) -> np.ndarray:
    """The same values in contiguous float32. bfloat16 is its upper half, which numpy shifts without holding its lock."""
    if weight.dtype != ml_dtypes.bfloat16:
        return np.ascontiguousarray(weight, np.float32)
    whole = np.ascontiguousarray(weight).view(np.uint16).astype(np.uint32)
    return np.left_shift(whole, 16, out=whole).view(np.float32)


def _by_ggml(source: np.ndarray, kind: str, factors: np.ndarray | None) -> np.ndarray:
    """The blocks of some rows by ggml."""
    kind_id, (rows, width), library = GGMLQuantizationType[kind], source.shape, _library()
    block, block_bytes = GGML_QUANT_SIZES[kind_id]
    target = np.empty((rows, width // block * block_bytes), np.uint8)
    library.ggml_quantize_init(kind_id)
    library.ggml_quantize_chunk(kind_id, source.ctypes.data, target.ctypes.data, 0, rows, width,
                                factors.ctypes.data if factors is not None else None)
    return target


def _in_lanes(source: np.ndarray, kind: str, factors: np.ndarray | None) -> np.ndarray:
    """The blocks of some rows by our kernel."""
    from quantline.methods.ggml.block_types import Blocks, block_type
    from quantline.methods.ggml.kquant_search import search

    one, count = block_type(kind), source.size // 256
    codes, halves = np.empty((count, 256), np.uint8), np.empty((count, 2), np.float32)
    scales, minima = (np.empty((count, 256 // one.sub), np.int16) for _ in range(2))
    importance = np.ones((1, 256), np.float32) if factors is None else factors.reshape(-1, 256)
    search(source.reshape(-1, 256), importance, factors is not None, int(kind[1]), codes, scales, minima, halves)
    d, dmin = np.hsplit(halves.astype(np.float16), 2)
    blocks = Blocks(codes, scales, minima, np.ascontiguousarray(d), np.ascontiguousarray(dmin))
    return one.pack(blocks).reshape(len(source), -1)
