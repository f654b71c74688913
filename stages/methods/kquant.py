"""ggml's own quantizer, called on blocks of rows in all threads: no model, no file, no 16-bit detour."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from stages.tracking import Failure, StageError

WITHOUT_IT_GGML_STOPS = ("IQ1_S", "IQ2_XXS", "IQ2_XS")  # with the whole process, at an assertion
WEIGHTS_AT_ONCE = 1 << 20  # weights in one call, so that the threads share the work evenly


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


def quantize(weight: np.ndarray, kind: str, importance: np.ndarray | None = None,
             threads: int | None = None) -> np.ndarray:
    """ggml blocks uint8 [rows, bytes per row] of a weight float32 [rows, width].

    `importance` [width] is positive, one weight per input: diag(H) for llama.cpp's importance matrix. Rows do not
    depend on each other, so the number of threads does not show in the bytes.
    Raises StageError: non_finite, importance_missing for a type that ggml does not make without.
    """
    if not np.isfinite(weight).all():
        raise StageError(Failure.NON_FINITE, "the weight is not finite")
    if importance is None and kind in WITHOUT_IT_GGML_STOPS:
        raise StageError(Failure.IMPORTANCE_MISSING, f"expected an importance matrix, since ggml does not make {kind} "
                                                     "without one, found none; choose another type")
    kind_id = GGMLQuantizationType[kind]
    block, block_bytes = GGML_QUANT_SIZES[kind_id]
    rows, width = weight.shape
    source = np.ascontiguousarray(weight, np.float32)
    target = np.empty((rows, width // block * block_bytes), np.uint8)
    factors = None if importance is None else np.ascontiguousarray(importance, np.float32)
    library = _library()
    library.ggml_quantize_init(kind_id)
    step = max(1, WEIGHTS_AT_ONCE // width)

    def run(start: int) -> None:
        count = min(step, rows - start)
        library.ggml_quantize_chunk(kind_id, source.ctypes.data, target.ctypes.data, start * width, count, width,
                                    factors.ctypes.data if factors is not None else None)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        list(pool.map(run, range(0, rows, step)))
    return target
