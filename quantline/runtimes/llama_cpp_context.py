"""llama.cpp's working memory for a model: key-value caches, and the batches that run in them."""

import ctypes
from types import ModuleType
from typing import Any

import numpy as np

from quantline.causes import ADVICE
from quantline.errors import Failure, StageError
from quantline.runtimes.llama_cpp_log import LOG, NO_REASON

KV_TYPE = 0  # ggml's F32: the cache is in full precision, so that figures show the weights alone
CELL_STEP = 256  # llama.cpp gives each sequence a multiple of so many places in the cache


class Context:
    """llama.cpp's working memory for a model."""

    def __init__(self, llama: ModuleType, model: Any, vocabulary: int) -> None:
        """Make no context yet: `prepare` knows its size."""
        self.llama = llama
        self.model = model
        self.vocabulary = vocabulary
        self.handle: Any = None
        self.room = (0, 0, 0)  # sequences, places of each, tokens at once

    def prepare(self, sequences: int, length: int, threads: int, batch: int) -> None:
        """Empty the context, and make room in it.

        Each sequence has a cache of its own. In a shared one it would also look at, and then mask,
        the cells of all others, and its logits would depend on its neighbours by rounding.

        Args:
            sequences: How many.
            length: Tokens of each sequence.
            threads: That compute.
            batch: Tokens that are run at once.

        Raises:
            StageError: out_of_memory, or runtime_crashed where llama.cpp names another reason.
        """
        llama = self.llama
        needed = (sequences, -(-length // CELL_STEP) * CELL_STEP, batch)
        if any(have < need for have, need in zip(self.room, needed, strict=True)):
            if self.handle is not None:
                llama.llama_free(self.handle)
            self.room = needed
            settings = llama.llama_context_default_params()
            settings.n_ctx = sequences * needed[1]
            settings.n_seq_max = sequences
            settings.kv_unified = False
            settings.n_batch = batch
            settings.n_ubatch = batch
            settings.type_k = KV_TYPE
            settings.type_v = KV_TYPE
            settings.flash_attn_type = 0
            LOG.clear()
            self.handle = llama.llama_init_from_model(self.model, settings)
            if not self.handle:
                raise _no_context(settings.n_ctx)
        llama.llama_set_n_threads(self.handle, threads, threads)
        llama.llama_memory_clear(llama.llama_get_memory(self.handle), True)

    def decode(self, tokens: np.ndarray, start: int, wanted: slice) -> np.ndarray:
        """Run tokens and return the logits of some of them.

        Args:
            tokens: int32 [b, n], one row per sequence.
            start: Position of the first token in its sequence.
            wanted: The columns whose logits are returned.

        Returns:
            float32 [b, columns, vocabulary] in llama.cpp's own memory, where the next call
            overwrites them.

        Raises:
            StageError: runtime_crashed.
        """
        llama = self.llama
        sequences, count = tokens.shape
        ids = np.ascontiguousarray(tokens, np.int32)
        positions = np.tile(np.arange(start, start + count, dtype=np.int32), sequences)
        owners = np.repeat(np.arange(sequences, dtype=np.int32), count)
        ones = np.ones(ids.size, np.int32)
        outputs = np.zeros((sequences, count), np.int8)
        outputs[:, wanted] = 1
        # llama.cpp wants a pointer to each token's list of sequences, which has one entry.
        addresses = owners.ctypes.data + 4 * np.arange(ids.size, dtype=np.uint64)

        def pointer(array: np.ndarray, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        batch = llama.llama_batch(
            n_tokens=ids.size,
            token=pointer(ids, llama.llama_token),
            pos=pointer(positions, llama.llama_pos),
            n_seq_id=pointer(ones, ctypes.c_int32),
            seq_id=pointer(addresses, ctypes.POINTER(llama.llama_seq_id)),
            logits=pointer(outputs, ctypes.c_int8),
        )
        LOG.clear()
        status = llama.llama_decode(self.handle, batch)
        if status:
            raise StageError(
                Failure.RUNTIME_CRASHED,
                f"expected llama_decode to return 0 for {ids.size} tokens, found {status} "
                f"(llama.cpp says: {LOG.reason()}); mend that, or leave the variant out",
            )
        columns = len(range(count)[wanted])
        if not columns:
            return np.empty((sequences, 0, self.vocabulary), np.float32)
        shape = (sequences, columns, self.vocabulary)
        return np.ctypeslib.as_array(llama.llama_get_logits(self.handle), shape)


def _no_context(tokens: int) -> StageError:
    """Return the error for a context that llama.cpp does not make."""
    reason = LOG.reason()
    # It names no cause of its own where the system gives it no memory.
    is_memory = "alloc" in reason or "memory" in reason or reason == NO_REASON
    failure = Failure.OUT_OF_MEMORY if is_memory else Failure.RUNTIME_CRASHED
    advice = ADVICE[Failure.OUT_OF_MEMORY] if is_memory else "mend that, or leave the variant out"
    return StageError(
        failure,
        f"expected llama.cpp to make a context of {tokens} tokens, found that it refuses "
        f"(llama.cpp says: {reason}); {advice}",
    )
