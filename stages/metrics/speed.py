"""Speed and memory of a runtime on this machine; never mixed with the quality figures, never deterministic."""

import resource
import statistics
import time

from stages.config import Speed
from stages.runtimes import Runtime

PROMPT_IDS = 100  # ids that every vocabulary has; the time does not depend on which


def measure(runtime: Runtime, settings: Speed, load_s: float) -> dict:
    """Tokens a second and the process's peak memory.

    Prefill is the prompt's tokens over the time to the first new one; decode is the new tokens, after a prompt of one
    token, over the time that they take. The first repetition warms up and is dropped; figures are medians over the
    others, the spread is least and greatest.
    """
    prompt = [index % PROMPT_IDS for index in range(settings.prompt_tokens)]

    def rate(ids: list[int], new_tokens: int, counted: int) -> float:
        started = time.perf_counter()
        runtime.generate(ids, new_tokens, set())
        return counted / (time.perf_counter() - started)

    runs = [(rate(prompt, 1, settings.prompt_tokens), rate(prompt[:1], settings.new_tokens, settings.new_tokens))
            for _ in range(settings.repetitions + 1)]
    prefill, decode = zip(*runs[1:], strict=True)
    return {
        "load_s": load_s, "prefill_tok_s": statistics.median(prefill), "decode_tok_s": statistics.median(decode),
        "prefill_spread": [min(prefill), max(prefill)], "decode_spread": [min(decode), max(decode)],
        "prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
