"""Hydra's and OmegaConf's errors in words of this project, each with what mends it here.

Their own advice is about Hydra's search path, its manual, or another way of calling it.
"""

import re
from pathlib import Path
from typing import NamedTuple

from quantline.config.validation import unknown_key

LISTS = {"recipe": "recipes", "variant": "variants"}  # groups of which several are chosen
ADVICE = "mend that override, or the file of conf/ that is named"


class Words(NamedTuple):
    """What Hydra says, and what to say instead.

    Attributes:
        pattern: Found in Hydra's message.
        said: With the pattern's groups as {0}, {1} and so on.
    """

    pattern: str
    said: str


# From the most particular to the most general.
WORDS = (
    Words(
        r"In '([\w./-]+)': (?:Could not find|Could not load) '([\w-]+)/([\w.-]+)'",
        "conf/{0}.yaml names {1}/{2}, and there is no conf/{1}/{2}.yaml; correct the name "
        "(`quantline list {1}s` has them), or write that file",
    ),
    Words(
        r"Multiple values for ([\w-]+)|^([\w-]+) appears more than once in the final defaults list",
        "{0} has one choice; give another one without the plus sign, {0}=..., and in a file of "
        "conf/ as `- override /{0}: ...`",
    ),
    Words(
        r"Could not override '(\w+)@[\w.-]*'",
        "{0} has one place in params.yaml; leave out what comes after the @: {0}=...",
    ),
    Words(
        r"Could not delete '(\w+)(?:=[^']*)?'\. No match in the defaults list",
        "{0} is not among the choices that can be left out; choose another: {0}=...",
    ),
    Words(
        r"Could not delete from config\. The value of '?([\w.-]+)'? is (.+?) and not",
        "{0}: expected its present value after ~{0}=, found another than {1}; write ~{0}",
    ),
    Words(
        r"Could not delete from config\. '?([\w.-]+)'?",
        "{0}: there is no such key to leave out; params.yaml has those that there are",
    ),
    Words(
        r"Could not append to config\. An item is already at '([\w.-]+)'",
        "{0} is there already; change it without the plus sign: {0}=...",
    ),
    Words(
        r"Interpolation key '([^']+)' not found",
        "${{{0}}} names no key of params.yaml; name one, such as ${{seed}}, or write \\${{{0}}} if "
        "these very letters are meant",
    ),
    Words(
        r"Environment variable '([^']+)' not found",
        "the environment has no variable {0}; set it, or take ${{oc.env:{0}}} out",
    ),
    Words(
        r"Unsupported interpolation type (\S+)",
        "${{{0}:...}} is no function that conf/ knows; take it out, or write \\${{ if these very "
        "letters are meant",
    ),
    Words(
        r"Cannot find primary config '([^']+)'",
        "expected conf/{0}.yaml, found no such file; get it back with `git checkout conf`",
    ),
)


def in_words(error: Exception, conf: Path) -> str:
    """Return what is wrong, and what to do about it.

    Args:
        error: Hydra's or OmegaConf's.
        conf: The folder conf/.
    """
    if "MissingMandatoryValue" in f"{type(error).__name__} {error}":
        key = getattr(error, "full_key", None)
        return f"{key} has no value; give one: {key}=..."
    text = str(error)
    if named := re.match(r"Could not override '([\w.-]+)'", text):
        deepest = getattr(error.__cause__, "full_key", None)
        return _not_there(named[1], str(deepest), conf)
    at = getattr(error, "full_key", None)
    for pattern, said in WORDS:
        if found := re.search(pattern, text):
            groups = [group for group in found.groups() if group is not None]
            return said.format(*groups) + (f" (at {at})" if at else "")
    text = re.split(r"\n\s*(?:Config search path|See https|object_type)", text.strip())[0]
    text = text.replace("full_key: ", "at ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join([*lines, ADVICE])


def _not_there(key: str, deepest: str, conf: Path) -> str:
    """Say why a key cannot be changed.

    Args:
        key: That somebody wants to change.
        deepest: As much of it as Hydra looked at.
        conf: The folder conf/.
    """
    unknown = unknown_key(key)
    if unknown:
        return unknown
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    group = next((group for group, plural in LISTS.items() if plural == section), None)
    what = f"{key}: there is no such key"
    if group is None:
        return f"{what}; +{key}=... adds it"
    if deepest != f"{section}.{name}":
        shown = f"`quantline show {group} {name}` has its options"
        return f"{what}: {name} has no such option; {shown}, and +{key}=... adds one"
    if (conf / group / f"{name}.yaml").is_file():
        also = " and a variant of it (+variant=...)" if group == "recipe" else ""
        return f"{what}: the suite has no {group} {name}; add it with +{group}={name}{also}"
    return f"{what}: there is no {group} {name}; `quantline list {section}` has the names"
