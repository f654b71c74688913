"""Overrides as people write them, in the form that Hydra's grammar takes.

Hydra reads a value as a little language: letters outside ASCII, commas, brackets, quotes and more
mean something to it, or nothing. Where the schema wants a text, such as a path, the value is what
was typed. What is a text to Hydra too stays as it is: quotes around the whole, escapes,
interpolations and null.
"""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantline.config.hydra_errors import LISTS
from quantline.config.params import Params
from quantline.config.validation import is_text, knows
from quantline.errors import ConfigError

# Keys that hold the path of something on this machine.
PATHS = (
    "model.path",
    "model.adapter",
    "model.converter",
    "calibration.path",
    "evaluation.path",
    "evaluation.gold",
    "evaluation.pythons.*",
    "recipes.*.importance_file",
)
COMPUTED = "conf_sha256"
HYDRA = "hydra"
_DOTTED = re.compile(r"(\+{0,2})([A-Za-z_][\w-]*(?:\.[\w.-]+)+)=(.*)", re.DOTALL)
SCHEME = re.compile(r"[A-Za-z][\w+.-]*:")  # to DVC, s3:x is no folder but an address
_QUOTES = "'\""


def is_path(key: str) -> bool:
    """Whether a dotted key of params.yaml holds a path."""
    return any(fnmatchcase(key, pattern) for pattern in PATHS)


def for_hydra(overrides: Sequence[str], conf: Path) -> list[str]:
    """Return overrides in Hydra's grammar.

    Args:
        overrides: As they were typed.
        conf: The folder conf/, whose choices they name.

    Raises:
        ConfigError: For one that is none, or that names a choice that there is not.
    """
    forms = []
    for override in overrides:
        try:
            override.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(
                f"expected an override in UTF-8, found {override!a}; rename the file"
            ) from None
        forms.append(_for_hydra(override))
        _check(override, _parse(forms[-1]), conf)
    return forms


def check_override(override: str, conf: Path) -> None:
    """Check what an override in Hydra's grammar names; several values may follow each other.

    Raises:
        ConfigError: If it is none, or names a choice that there is not.
    """
    parsed = _parse(override)
    if parsed is None or not parsed.is_sweep_override():
        _check(override, parsed, conf)


def _for_hydra(override: str) -> str:
    """Return one override with its value in quotes where Hydra would take it for something else.

    A key that the schema knows may be new to conf/, as an interpreter in `evaluation.pythons` is.
    """
    named = _DOTTED.fullmatch(override)
    if named is None:
        return override
    plus, key, value = named.groups()
    if plus or knows(key):
        plus = "++"
    if is_text(key):
        value = _text_for_hydra(key, value)
    return f"{plus}{key}={value}"


def _text_for_hydra(key: str, value: str) -> str:
    """Return the value of a text in Hydra's grammar."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if is_path(key):
        if not value.strip():
            raise ConfigError(f"{key}= has no value; give a path, or null")
        if value == "~" or value.startswith("~/"):
            value = _below_home(key, value)
        elif SCHEME.match(value) and "://" not in value:
            value = f"./{value}"
    if _is_hydras(key, value):
        return value
    # Inside quotes OmegaConf still finds interpolations.
    escaped = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    return QuotedString(escaped, Quote.double).with_quotes()


def _is_hydras(key: str, value: str) -> bool:
    """Whether a value means to Hydra what it says, or something that only Hydra knows."""
    if value.lower() == "null" or value == "":
        return True
    if is_path(key) and Path(value).exists():
        return False
    parsed = _parse(f"{key}={value}")
    found = None if parsed is None else parsed.value()
    if "${" in value or (parsed is not None and found == value):
        return True
    if parsed is None or value != value.strip():
        return False
    whole = value[0] in _QUOTES and value[-1] == value[0]
    escaped = isinstance(found, str) and "\\" in value
    return whole or escaped


def _below_home(key: str, value: str) -> str:
    """Replace a leading ~ by the home folder, as a shell would do at the beginning of a word."""
    try:
        return str(Path.home()) + value.removeprefix("~")
    except RuntimeError:
        raise ConfigError(
            f"{key}: expected a home folder for {value}, found none; write the whole path"
        ) from None


def _parse(override: str) -> Any:
    """Return Hydra's reading of an override; None if it is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        return None


def _check(override: str, parsed: Any, conf: Path) -> None:
    """Check what an override names.

    Args:
        override: As it was typed.
        parsed: Hydra's reading of it; None if it cannot be read.
        conf: The folder conf/.

    Raises:
        ConfigError: If it is none, or names a choice that there is not.
    """
    key, equals, value = override.partition("=")
    key = key.lstrip("+~").partition("@")[0]
    if key == COMPUTED:
        raise ConfigError(f"{COMPUTED} is computed from conf/; leave it out")
    if key.partition(".")[0].partition("/")[0] == HYDRA:
        raise ConfigError(f"{key} changes Hydra, not params.yaml; leave it out")
    groups = sorted(path.name for path in conf.iterdir() if path.is_dir())
    if not key or (parsed is None and key not in groups):
        raise ConfigError(_malformed(override, key, bool(equals)))
    if parsed is not None and parsed.is_sweep_override():
        raise ConfigError(
            f"{override} has several values; write key=[value,value] for a list, or give it to "
            "`dvc exp run --queue -S`, which makes an experiment of each"
        )
    names = sorted({*groups, *Params.model_fields})
    if equals and "." not in key and key not in names:
        raise ConfigError(
            f"{key}: unknown key{near(key, names)}; valid keys here are {', '.join(names)}"
        )
    if key in groups and override.startswith("~"):
        instead = f"{key}=..." if key not in LISTS else f"~{LISTS[key]}.<name>"
        what = "choose another" if key not in LISTS else f"or leave one {key} out"
        raise ConfigError(f"{override}: params.yaml needs its {key}; {what}: {instead}")
    if key in groups and equals:
        chosen = value if parsed is None else parsed.value()
        for choice in chosen if isinstance(chosen, list) else [chosen]:
            _check_choice(conf, key, choice)


def _check_choice(conf: Path, group: str, choice: Any) -> None:
    if choice is not None and (conf / group / f"{choice}.yaml").is_file():
        return
    names = sorted(path.stem for path in (conf / group).glob("[!_]*.yaml"))
    raise ConfigError(
        f"{group}={choice}: there is no {group} {choice}{near(str(choice), names)}; there are "
        f"{', '.join(names)}"
    )


def _malformed(override: str, key: str, has_value: bool) -> str:
    """Say what is wrong with an override that Hydra cannot read."""
    expected = f"expected an override of the form key=value, found {override!r}"
    if not has_value or not re.fullmatch(r"[A-Za-z_][\w.-]*(/[\w-]+)*", key, re.ASCII):
        return f"{expected}; `quantline compose suite=quick target.max_size_mib=500` has two"
    return (
        f"{expected}, whose value Hydra cannot read; put each text in it that has other letters "
        "than a-z, or signs, into double quotes inside the shell's single ones, such as "
        "'evaluation.smoke_prompts=[\"Größe:\"]'"
    )


def near(name: str, names: Sequence[str]) -> str:
    """Return the name that was meant; of names like gptq-w4g128 the first part may be enough."""
    found = difflib.get_close_matches(name, names, n=1)
    if not found:
        first = difflib.get_close_matches(name, {each.partition("-")[0] for each in names}, n=1)
        found = [each for each in names if first and each.partition("-")[0] == first[0]][:3]
    return f" (did you mean {' or '.join(found)}?)" if found else ""
