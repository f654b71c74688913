"""Speed and memory of a runtime on this machine; never mixed with the quality figures, never deterministic."""

import os
import time

import numpy as np

from quantline.config.params import Speed
from quantline.metrics import machine
from quantline.runtimes.runtime import Runtime

PROMPT_IDS = 100  # ids that every vocabulary has; the time does not depend on which


def measure(runtime: Runtime, settings: Speed, load_s: float) -> dict:
    """Tokens a second of one sequence, the process's peak memory until here, and what they were measured with.

    Prefill is the prompt's tokens over the time to the first new one; decode is the new tokens, after a prompt of one
    token, over the time that they take. The first repetition warms up and is dropped; a figure is the median over the
    others, `_iqr` the range from their first to their third quartile, `_spread` least and greatest. `load_s` is one
    reading, with the files in the page cache.
    """
    load_average = os.getloadavg()[0]  # of the minute before: others that were busy make the figures low
    prompt = [index % PROMPT_IDS for index in range(settings.prompt_tokens)]

    def rate(ids: list[int], new_tokens: int, counted: int) -> float:
        started = time.perf_counter()
        runtime.generate(ids, new_tokens, set())
        return counted / (time.perf_counter() - started)

    runs = [(rate(prompt, 1, settings.prompt_tokens), rate(prompt[:1], settings.new_tokens, settings.new_tokens))
            for _ in range(settings.repetitions + 1)]
    prefill, decode = zip(*runs[1:], strict=True)
    return {
        "load_s": load_s, **_figures("prefill", prefill), **_figures("decode", decode), "peak_rss_mib": machine.peak_mib(),
        "batch": 1, "prompt_tokens": settings.prompt_tokens, "new_tokens": settings.new_tokens,
        "repetitions": settings.repetitions, "threads": settings.threads or os.cpu_count(), "device": runtime.device,
        "load_average": load_average, "machine": machine.describe(),
    }


def _figures(name: str, rates: tuple[float, ...]) -> dict:
    first, median, third = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return {f"{name}_tok_s": median, f"{name}_iqr": [first, third], f"{name}_spread": [min(rates), max(rates)]}
