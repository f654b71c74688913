"""All figures of one bundle, measured in this process: the library call of the stage `evaluate`.

Arguments and result are plain JSON, so that a fresh process can make the call. Nothing here imports
torch or transformers; a runtime that needs them does.
"""

import time
from pathlib import Path
from typing import Any

from quantline.config.texts import Speed
from quantline.files import read_json
from quantline.metrics.quality import measure_quality
from quantline.metrics.speed import check_speed, measure_speed
from quantline.runtimes.runtime import engine_class, open_runtime


def measure_bundle(
    *,
    bundle: str,
    runtime: str,
    reference: str,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    threads: int | None,
) -> dict[str, Any]:
    """Load a bundle and measure its speed, then its quality.

    Speed comes first, so that the peak of the memory is that of serving, and not of what the
    quality figures need.

    Args:
        bundle: Folder of the bundle.
        runtime: Name of the runtime.
        reference: Folder of the reference stage.
        prompt_tokens: Tokens of the prompt whose prefill is timed.
        new_tokens: Tokens whose decoding is timed.
        repetitions: Timed repetitions, after one to warm up.
        threads: Threads of the runtime; None is one per core.

    Returns:
        {quality, items, speed, runtime_version}.

    Raises:
        StageError: config_invalid, runtime_unavailable, runtime_crashed, tokenizer_mismatch,
            non_finite.
    """
    settings = Speed(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=threads,
    )
    check_speed(settings, read_json(Path(reference) / "reference.json").get("positions"))
    engine_class(runtime)  # its module is imported before the clock starts
    started = time.perf_counter()
    engine = open_runtime(runtime, Path(bundle), threads)
    speed = measure_speed(engine, settings, load_s=time.perf_counter() - started)
    quality, items = measure_quality(engine, Path(reference))
    return {
        "quality": quality,
        "items": items,
        "speed": speed,
        "runtime_version": engine.version,
    }
