"""Where a runtime begins and ends a text by itself, as its own server does."""

import numpy as np

from quantline.errors import Failure, StageError
from quantline.runtimes.runtime import Runtime, ServingRuntime

SAMPLE = "a b"  # whose tokens are looked for between those around it


def own_tokens(runtime: Runtime) -> tuple[list[int], list[int]]:
    """Return the ids that a runtime puts before every text, and those at which it ends one.

    Raises:
        StageError: missing_tokenizer, for a runtime that does not know.
    """
    if not isinstance(runtime, ServingRuntime):
        raise StageError(
            Failure.MISSING_TOKENIZER,
            "expected special_tokens.json in the bundle, which says where a text ends, found none, "
            f"and {runtime.name} does not know; export the variant again",
        )
    plain = runtime.encode(SAMPLE)
    whole = runtime.encode_whole(SAMPLE)
    starts = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
    width = runtime.logprobs(np.array([plain], np.int32)).shape[-1]
    ends = [token for token in range(width) if runtime.stops_at(token)]
    return whole[: starts[0]] if starts else [], ends
