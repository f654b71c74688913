"""What config.json means, as transformers' own configuration class takes it.

`load` asks transformers once and keeps its answer beside config.json as configuration.json, so that
later stages have the class's defaults without importing it. config.json itself stays as its maker
wrote it, because bundles carry it to tools of any version.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.model.configuration_limits import check_numbers
from quantline.model.model_class import class_name
from quantline.model.special_floats import tagged, untagged

CONFIG = "config.json"
FILE = "configuration.json"
LARGEST_CONFIG = 8 << 20  # bytes; the longest are some hundred KB
# Keys by which a config.json chooses code, some of it from the Hub. They say how a model is
# computed, never what it is.
CODE_CHOICES = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "attn_implementation",
        "auto_map",
        "custom_generate",
        "custom_pipelines",
        "experts_implementation",
        "kernel_config",
        "trust_remote_code",
        "use_kernels",
    }
)
# Attributes of transformers' classes by which they find others.
CLASS_KEYS = frozenset({"attribute_map", "sub_configs", "sub_configs_defaults"})
# What models without a table call the epsilon of their norms.
NORM_EPS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "layernorm_epsilon",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json as it is.

    Raises:
        StageError: missing_file; unsupported_architecture, for one that is absurdly large.
    """
    path = folder / CONFIG
    if path.is_file() and path.stat().st_size > LARGEST_CONFIG:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {path} to have at most {LARGEST_CONFIG} bytes, found "
            f"{path.stat().st_size}; fetch the checkpoint again",
        )
    return read_json(path)


def read_configuration(folder: Path) -> dict[str, Any]:
    """Return the completed configuration of a folder.

    That which `load` has kept is taken if it belongs to the config.json that is there now.

    Raises:
        StageError: missing_file, and as `complete` does.
    """
    kept = folder / FILE
    if kept.is_file():
        known = read_json(kept)
        if known.get("config_sha256") == _sha256(folder / CONFIG):
            return known["configuration"]
    return complete(read_config(folder))


def write_configuration(folder: Path) -> None:
    """Keep the completed configuration of a folder beside its config.json; raises as `complete`."""
    configuration = complete(read_config(folder))
    digest = _sha256(folder / CONFIG)
    write_json(folder / FILE, {"config_sha256": digest, "configuration": configuration})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_code_choices(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration without the keys that choose code, at any depth, and their names."""
    kept = {}
    dropped = []
    for key, value in config.items():
        if key in CODE_CHOICES:
            dropped.append(key)
            continue
        if isinstance(value, dict):
            kept[key], inner = without_code_choices(value)
            dropped += [f"{key}.{name}" for name in inner]
        else:
            kept[key] = value
    return kept, dropped


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with transformers' defaults, and sizes under their usual names.

    The rotary embedding is in `rope_parameters`, however config.json spells it. Of a model that
    reads more than text it is what its language model is made of.

    Raises:
        StageError: As `transformers_config` does.
    """
    whole = transformers_config(config)
    known = whole.get_text_config(decoder=True)
    completed = known.to_dict() | {"model_type": whole.model_type}
    classes = config.get("architectures")
    if isinstance(classes, list) and len(classes) > 1:
        completed["architectures"] = [class_name(config)]
    for usual in known.attribute_map:
        if hasattr(known, usual):
            completed[usual] = getattr(known, usual)
    named_eps = [completed[name] for name in NORM_EPS if completed.get(name) is not None]
    completed.setdefault("rms_norm_eps", named_eps[0] if named_eps else 0.0)
    if completed.get("intermediate_size") is None:  # Bloom, and GPT-2 where it does not say
        completed["intermediate_size"] = 4 * completed.get("hidden_size", 0)
    if "logits_scaling" in completed:  # Granite divides
        completed["logit_scale"] = 1 / completed["logits_scaling"]
    return json.loads(json.dumps(tagged(completed), default=str))


def transformers_config(config: dict[str, Any]) -> Any:
    """Return transformers' configuration, made by its own classes alone.

    It has none of the keys that choose code.

    Raises:
        StageError: unsupported_architecture, naming the key, for a value that transformers or a
            computer cannot take.
    """
    return _from_text(json.dumps(config, sort_keys=True, default=str))()


@cache
def _from_text(text: str) -> Any:
    """Return what makes the configuration of a config.json anew, or raise as its caller."""
    config, _ = without_code_choices(untagged(json.loads(text)))
    for key, value, is_bound in _scalars(config):
        allowed = is_bound and not math.isnan(value) if isinstance(value, float) else True
        if not (allowed or math.isfinite(value)):
            raise refusal(key, "a number", str(value))
    check_numbers(config)
    # Classes that compute with kernels fetch them from the Hub where that is not switched off.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = _class_of(config)
    config.pop("model_type", None)
    config.pop("quantization_config", None)
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise refusal("model_type", "a model that transformers knows", repr(name))
    config_class = CONFIG_MAPPING[name]
    fields = {field.name for field in dataclasses.fields(config_class)}
    for key in config:
        taken = key in CLASS_KEYS or callable(getattr(config_class, key, None))
        if key not in fields and (taken or key.startswith("__")):
            raise refusal(key, "no such key", "one that transformers means something else by")
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(getattr(torch, str(value), None), torch.dtype):
            raise refusal(key, "a number type such as bfloat16", repr(value))

    def make() -> Any:
        return config_class(**json.loads(json.dumps(config)))

    try:
        make().to_dict()
    except Exception as error:  # its validators, and whatever a strange value breaks
        culprit = _culprit(config_class, config)
        words = " ".join(str(error).split()) or type(error).__name__
        raise refusal(culprit, f"what transformers takes for {name}", words) from error
    _check_rope(make())
    return make


def _class_of(config: dict[str, Any]) -> Any:
    """Return the model type whose class transformers' AutoConfig takes for a config.json."""
    name = config.get("model_type")
    # Mistral has one kind of attention for all layers; with a list of kinds it is another class.
    return "ministral" if name == "mistral" and "layer_types" in config else name


def _culprit(config_class: Any, config: dict[str, Any]) -> str | None:
    """Return the key without which transformers takes a configuration; None if there is no one."""
    for key in config:
        others = {name: value for name, value in config.items() if name != key}
        try:
            config_class(**json.loads(json.dumps(others))).to_dict()
        except Exception:  # as its caller
            continue
        return key
    return None


def _check_rope(config: Any) -> None:
    """Refuse a rotary embedding that transformers takes here and cannot compute later."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return
    if not isinstance(parameters, dict):
        raise refusal("rope_parameters", "an object", repr(parameters))
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    for values in nested or [parameters]:
        kind = values.get("rope_type", "default")
        if kind not in kinds:
            raise refusal(
                "rope_parameters.rope_type (or rope_scaling.type)",
                f"one of {', '.join(sorted(kinds))}",
                repr(kind),
            )
        for key, value in values.items():
            _check_rope_value(key, value)


def _check_rope_value(key: str, value: Any) -> None:
    """Refuse a value of the rotary embedding that is no number where one is needed."""
    name = f"rope_parameters.{key} (or rope_scaling.{key})"
    if key in ("rope_type", "type") or isinstance(value, bool):
        return
    if isinstance(value, list):
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise refusal(name, "numbers", repr(item))
        return
    needed = key in ("rope_theta", "factor")
    if value is None and not needed:
        return
    if not isinstance(value, int | float) or (needed and not value > 0):
        raise refusal(name, "a number above 0" if needed else "a number", repr(value))


def _scalars(value: Any, key: str = "", is_bound: bool = False) -> Iterator[tuple[str, Any, bool]]:
    """Yield the dotted key and value of every number and text of a configuration.

    With each comes whether it is one of a pair, which may be the bounds of something.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _scalars(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _scalars(inner, key, len(value) == 2)
    else:
        yield key, value, is_bound


def refusal(key: str | None, expected: str, found: str) -> StageError:
    """Return the error for a value of config.json that cannot be taken.

    Args:
        key: Of the value; None where it is not known which of them it is.
        expected: Of the value, in words.
        found: The value, or what was said of it.
    """
    where = f"{key} in {CONFIG}" if key else CONFIG
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {expected} for {where}, found {found}; take the config.json that the weights "
        "were saved with, or mend it",
    )
