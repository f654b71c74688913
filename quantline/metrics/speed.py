"""Speed and memory of a runtime on this machine.

They are never mixed with the quality figures, and never deterministic.
"""

import os
import time
from typing import Any

import numpy as np

from quantline.config.texts import Speed
from quantline.errors import Failure, StageError
from quantline.metrics.machine import (
    describe_machine,
    other_work,
    read_processors,
)
from quantline.run.peak_memory import peak_memory_mib
from quantline.run.progress import progress
from quantline.runtimes.runtime import Runtime

WARM_UP_TOKENS = 8  # that are decoded before anything is timed
FEWEST = 3  # repetitions, whose median one disturbance cannot move far
PROMPT_IDS = 100  # ids that every vocabulary has; the time does not depend on which


def check_speed(settings: Speed, positions: int | None) -> None:
    """Check the lengths of a speed measurement against a model's learned positions.

    A runtime without such a position stops, or reads what is not there.

    Args:
        settings: With the lengths.
        positions: How many the model has; None if it computes them.

    Raises:
        StageError: config_invalid.
    """
    if positions is None:
        return
    found = []
    for name in ("prompt_tokens", "new_tokens"):
        length = getattr(settings, name)
        if length >= positions:
            found.append(f"evaluation.speed.{name}={length}")
    if found:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected lengths below the model's {positions} positions, found "
            f"{' and '.join(found)}; set {positions - 1} or less",
        )


def measure_speed(runtime: Runtime, settings: Speed, load_s: float) -> dict[str, Any]:
    """Measure tokens per second of one sequence.

    Prefill is the prompt's tokens over the time to the first new one; decode is the new tokens,
    after a prompt of one token, over the time that they take. A few tokens warm up before; a figure
    is the median over the repetitions.

    Args:
        runtime: With the bundle loaded.
        settings: Lengths, repetitions and threads.
        load_s: Seconds that loading took: one reading, with the files in the page cache.

    Returns:
        The figures, with `_iqr` the range from their first to their third quartile and `_spread`
        least and greatest; the process's peak memory until here; what all of it was measured with;
        and what else ran meanwhile (see `other_work`).
    """
    # Of the minute before: other processes that were busy make the figures low.
    load_average = os.getloadavg()[0]
    before = read_processors()
    prompt = [index % PROMPT_IDS for index in range(settings.prompt_tokens)]
    prefill = []
    decode = []
    _seconds_to_generate(runtime, prompt, 1)
    _seconds_to_generate(runtime, prompt[:1], min(WARM_UP_TOKENS, settings.new_tokens))
    started = time.perf_counter()
    for done in progress(range(settings.repetitions), "speed", "repetition"):
        spent = time.perf_counter() - started
        if settings.seconds is not None and done >= FEWEST and spent >= settings.seconds:
            break
        seconds = _seconds_to_generate(runtime, prompt, 1)
        prefill.append(settings.prompt_tokens / seconds)
        seconds = _seconds_to_generate(runtime, prompt[:1], settings.new_tokens)
        decode.append(settings.new_tokens / seconds)
    threads = settings.threads or os.cpu_count() or 1
    meanwhile = other_work(before, read_processors(), threads, load_average)
    return {
        "load_s": load_s,
        **_statistics("prefill", prefill),
        **_statistics("decode", decode),
        "peak_rss_mib": peak_memory_mib(),
        "batch": 1,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "repetitions": len(decode),
        "threads": threads,
        "device": runtime.device,
        **meanwhile,
        "machine": describe_machine(),
        "measured_on": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _seconds_to_generate(runtime: Runtime, prompt: list[int], new_tokens: int) -> float:
    started = time.perf_counter()
    runtime.generate(prompt, new_tokens, set())
    return time.perf_counter() - started


def _statistics(name: str, rates: list[float]) -> dict[str, Any]:
    """Return median, quartiles and extremes of rates."""
    first, median, third = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return {
        f"{name}_tok_s": median,
        f"{name}_iqr": [first, third],
        f"{name}_spread": [min(rates), max(rates)],
    }
