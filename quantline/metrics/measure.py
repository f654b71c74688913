"""All figures of one bundle, measured in this process: the library call of the stage `evaluate`.

Arguments and results are plain JSON, so that a fresh process can make the calls. Nothing here
imports torch or transformers; a runtime that needs them does.
"""

import time
from pathlib import Path
from typing import Any

from quantline.config.texts import Speed
from quantline.files import read_json, write_tensors
from quantline.metrics.quality import (
    check_vocabulary,
    measure_divergence,
    measure_quality,
    measure_questions,
)
from quantline.metrics.speed import check_speed, measure_speed
from quantline.runtimes.runtime import Runtime, engine_class, open_runtime

TOKENS = "tokens.safetensors"  # the values of a part's tokens


def measure_bundle(
    *, bundle: str, runtime: str, reference: str, speed: dict[str, Any]
) -> dict[str, Any]:
    """Load a bundle and measure its speed, then its quality.

    Speed comes first, so that the peak of the memory is that of serving, and not of what the
    quality figures need.

    Args:
        bundle: Folder of the bundle.
        runtime: Name of the runtime.
        reference: Folder of the reference stage.
        speed: The fields of Speed.

    Returns:
        {quality, items, speed, runtime_version}.

    Raises:
        StageError: config_invalid, runtime_unavailable, runtime_crashed, tokenizer_mismatch,
            non_finite.
    """
    engine, measured = _measure_serving(bundle, runtime, reference, speed)
    quality, items = measure_quality(engine, Path(reference), speed.get("threads"))
    return {"quality": quality, "items": items, **measured}


def measure_serving(
    *, bundle: str, runtime: str, reference: str, speed: dict[str, Any]
) -> dict[str, Any]:
    """Measure the speed alone, as `measure_bundle` does.

    Returns:
        {speed, runtime_version}.
    """
    return _measure_serving(bundle, runtime, reference, speed)[1]


def measure_part(
    *,
    bundle: str,
    runtime: str,
    reference: str,
    part: tuple[int, int],
    threads: int | None,
    folder: str,
) -> dict[str, Any]:
    """Measure the tokens of a part of the evaluation text.

    Args:
        bundle: Folder of the bundle.
        runtime: Name of the runtime.
        reference: Folder of the reference stage.
        part: Its number, and of how many.
        threads: Of the runtime; None is one per core.
        folder: Where TOKENS is written.

    Returns:
        {runtime_version, device}.

    Raises:
        StageError: As `measure_bundle` does.
    """
    engine = open_runtime(runtime, Path(bundle), threads)
    number, parts = part
    collector = measure_divergence(engine, Path(reference), 0, (number, parts), threads)
    write_tensors(Path(folder) / TOKENS, collector.values().arrays())
    return {"runtime_version": engine.version, "device": engine.device}


def measure_gold(
    *, bundle: str, runtime: str, reference: str, threads: int | None
) -> dict[str, Any]:
    """Ask the questions of the gold set.

    Returns:
        {results: the fields of a GoldResult of each, runtime_version, device}.

    Raises:
        StageError: As `measure_bundle` does.
    """
    engine = open_runtime(runtime, Path(bundle), threads)
    check_vocabulary(engine, Path(reference))
    results = measure_questions(engine, Path(reference))
    return {
        "results": [result.as_dict() for result in results],
        "runtime_version": engine.version,
        "device": engine.device,
    }


def _measure_serving(
    bundle: str, runtime: str, reference: str, speed: dict[str, Any]
) -> tuple[Runtime, dict[str, Any]]:
    """Load a bundle and measure its speed; return it with what `measure_serving` returns."""
    settings = Speed(**speed)
    check_speed(settings, read_json(Path(reference) / "reference.json").get("positions"))
    engine_class(runtime)  # its module is imported before the clock starts
    started = time.perf_counter()
    engine = open_runtime(runtime, Path(bundle), settings.threads)
    figures = measure_speed(engine, settings, load_s=time.perf_counter() - started)
    return engine, {"speed": figures, "runtime_version": engine.version}
