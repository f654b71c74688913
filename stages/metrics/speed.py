"""Speed and memory of a runtime on this machine; never mixed with the quality figures, never deterministic."""

import resource
import statistics
import time

from stages.config import Speed
from stages.runtimes import Runtime

PROMPT_IDS = 100  # ids that every vocabulary has; the time does not depend on which


def measure(runtime: Runtime, settings: Speed, load_s: float) -> dict:
    """Tokens a second and the process's peak memory.

    Prefill is the time to the first token of a prompt; decode is what each further token adds. The first repetition
    warms up and is dropped; figures are medians over the others, the spread is least and greatest.
    """
    prompt = [index % PROMPT_IDS for index in range(settings.prompt_tokens)]
    prefill, decode = [], []
    for repetition in range(settings.repetitions + 1):
        started = time.perf_counter()
        runtime.generate(prompt, 1, set())
        first = time.perf_counter() - started
        started = time.perf_counter()
        runtime.generate(prompt, settings.new_tokens, set())
        rest = time.perf_counter() - started - first
        if repetition and rest > 0:
            prefill.append(settings.prompt_tokens / first)
            decode.append((settings.new_tokens - 1) / rest)
    return {
        "load_s": load_s, "prefill_tok_s": statistics.median(prefill), "decode_tok_s": statistics.median(decode),
        "prefill_spread": [min(prefill), max(prefill)], "decode_spread": [min(decode), max(decode)],
        "prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
