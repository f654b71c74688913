"""From a quantized checkpoint's folder to a plain one, which everything after `load` reads."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantline.causes import reading_foreign
from quantline.errors import Failure, StageError
from quantline.files import write_json
from quantline.ingest.dequantize.codes_writer import CodesWriter
from quantline.ingest.dequantize.dequantizer import DEQUANTIZERS, Dequantizer, Parts, Plan
from quantline.ingest.dequantize.plain_checkpoint import (
    DTYPE_KEYS,
    KEYS,
    PlainWriter,
    rounded,
    target_dtype,
    without_settings,
)
from quantline.ingest.dequantize.stored import DTYPES, PLAIN, StoredTensors
from quantline.model.checkpoint_files import inside, side_files
from quantline.model.configuration import CONFIG, read_config
from quantline.model.dtypes import STORED_NAMES
from quantline.run.progress import progress

UNNAMED = ""  # the method of settings that name none
LONGEST_SETTING = 200  # characters of JSON of an option that the manifest repeats
# Files in which libraries keep, or kept, their settings, and which transformers does not read.
SETTINGS_BESIDE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Buffers that a checkpoint may hold besides its weights; verify looks at them.
BUFFERS = frozenset({"F64", "I64", "BOOL"})


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a configuration and those of the models inside it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield value


def settings_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what config.json says of its quantization; None for a plain model.

    Raises:
        StageError: unsupported_architecture, for settings that are no object, or several.
    """
    found: list[dict[str, Any]] = []
    for section in _sections(config):
        for key in KEYS:
            settings = section.get(key)
            if not settings or settings in found:
                continue
            if not isinstance(settings, dict):
                raise StageError(
                    Failure.UNSUPPORTED_ARCHITECTURE,
                    f"expected {key} in {CONFIG} to be an object, found {settings!r:.80}; fetch "
                    "the checkpoint again",
                )
            found.append(settings)
    if len(found) > 1:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected one quantization in {CONFIG}, found {len(found)} that differ; take the "
            "config.json that the weights were saved with",
        )
    return found[0] if found else None


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the method's name; older files of some leave it out."""
    if settings.get("quant_method") is None:
        if {"load_in_4bit", "load_in_8bit"} & set(settings):
            return "bitsandbytes"
        if "config_groups" in settings:
            return "compressed-tensors"
        return UNNAMED
    return str(settings["quant_method"])


def check(config: Mapping[str, Any]) -> Dequantizer | None:
    """Return what reads the checkpoint of a config.json; None for a plain model.

    Raises:
        StageError: unsupported_architecture, for a method or an option that is not known.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    method = method_of(settings)
    if method not in DEQUANTIZERS:
        found = f"quantization_config of {method}"
        advice = "start from its full-precision source"
        if method == UNNAMED:
            found = "a quantization_config that names no quant_method"
            advice = "take the config.json that the weights were saved with, or name the method"
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected a plain model, or one quantized by {', '.join(DEQUANTIZERS)}, found "
            f"{found} in {CONFIG}; {advice}",
        )
    expected = f"a quantization_config of {method} as its makers write it"
    with reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, expected):
        return DEQUANTIZERS[method](settings | {"quant_method": method}, config)


def check_plain(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose tensors are quantized though its config.json does not say how.

    Args:
        folder: The checkpoint.
        names: Its tensors.

    Raises:
        StageError: unsupported_architecture.
    """
    endings = tuple(ending for found in DEQUANTIZERS.values() for ending in found.SIGNS)
    quantized = sorted(name for name in names if name.endswith(endings))
    if not quantized:
        return
    beside = [name for name in SETTINGS_BESIDE if (folder / name).is_file()]
    advice = f"take the {CONFIG} that the weights were saved with"
    if beside:
        advice = f"put what {beside[0]} says there, and with it the quant_method"
    raise StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected a quantization_config in {folder / CONFIG} beside quantized tensors such as "
        f"{quantized[0]}, found none; {advice}, or start from the full-precision source",
    )


def dequantize(origin: Path, target: Path) -> dict[str, Any]:
    """Write the plain checkpoint that a quantized one stands for.

    Args:
        origin: The quantized checkpoint.
        target: A new folder, which gets the files beside the weights too.

    Returns:
        The step for the manifest's transforms.

    Raises:
        StageError: unsupported_architecture, missing_shard, non_finite, path_escape.
    """
    config = read_config(origin)
    dequantizer = check(config)
    assert dequantizer is not None, "asked for quantized checkpoints only"
    target.mkdir()
    for name in side_files(origin):
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(origin, name), copy)
    dtype = target_dtype(config)
    write_json(target / CONFIG, plain_config(config, dtype))
    stored = StoredTensors(origin)
    plan = dequantizer.plan(stored)
    check_plan(dequantizer, stored, plan)
    names = sorted({*plan.restored, *plan.kept})
    codes = CodesWriter(target, names)
    with PlainWriter(target, names) as writer, codes:
        for name in progress(names, "dequantizing", "tensor"):
            if name in plan.restored:
                parts = Parts(name, stored, plan.restored[name])
                writer.add(name, restore(dequantizer, parts, dtype))
                grouped = dequantizer.grouped(parts)
                if grouped is not None:
                    codes.add_grouped(name.removesuffix(".weight"), grouped)
            else:
                writer.add(name, stored.read(name))
    return step_of(dequantizer, plan, dtype)


def plain_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return config.json of the plain model."""
    plain = without_settings(config)
    for key in DTYPE_KEYS:
        if plain.get(key) not in (None, "auto", *STORED_NAMES):  # the name of an 8-bit type
            plain[key] = dtype
    return plain


def check_plan(dequantizer: Dequantizer, stored: StoredTensors, plan: Plan) -> None:
    """Refuse a checkpoint in which nothing is quantized, or something twice, or is left over.

    Raises:
        StageError: unsupported_architecture.
    """
    if not plan.restored:
        raise dequantizer.refusal("quantized tensors", f"none in {stored.folder}")
    for name in plan.kept:
        if name in plan.restored:
            others = ", ".join(sorted(plan.restored[name].values()))
            raise dequantizer.refusal(
                f"{name} either plain or quantized", f"it plain beside {others}"
            )
    for name in plan.kept:
        if stored.dtype(name) not in BUFFERS | set(PLAIN):
            raise dequantizer.refusal(
                "every tensor to be plain or to belong to a quantized one",
                f"{name} in {stored.dtype(name)}, which belongs to none",
            )
    for parts in plan.restored.values():
        for name in parts.values():
            if stored.dtype(name) not in DTYPES:
                raise dequantizer.refusal("known dtypes", f"{name} in {stored.dtype(name)}")


def restore(dequantizer: Dequantizer, parts: Parts, dtype: str) -> np.ndarray:
    """Return a plain tensor, rounded once; of many experts one at a time is in float32."""
    expected = f"the parts of {parts.name} to fit each other, as {dequantizer.method} stores them"
    # What overflows is named when it is rounded.
    quiet = np.errstate(over="ignore", invalid="ignore")
    with quiet, reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, expected):
        count = dequantizer.experts(parts)
        if count is None:
            return rounded(parts.name, dequantizer.restore(parts), dtype)
        result: np.ndarray | None = None
        for number in range(count):
            one = rounded(parts.name, dequantizer.restore(parts.of_expert(number, count)), dtype)
            if result is None:
                result = np.empty((count, *one.shape), one.dtype)
            result[number] = one
        if result is None:
            raise dequantizer.refusal("experts", f"none in {parts.name}")
        return result


def step_of(dequantizer: Dequantizer, plan: Plan, dtype: str) -> dict[str, Any]:
    """Return what the manifest says of the step."""
    settings = {}
    for option, value in sorted(dequantizer.settings.items()):
        if option != "quant_method" and len(json.dumps(value)) <= LONGEST_SETTING:
            settings[option] = value
    return {
        "step": "dequantize",
        "method": dequantizer.method,
        "settings": settings,
        "dtype": dtype,
        "tensors": len(plan.restored),
        "left_out": sorted({name.rpartition(".")[2] for name in plan.dropped}),
    }
