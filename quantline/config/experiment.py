"""Writing overrides as a file of conf/experiment/, so that every composition starts from them.

What concerns recipes and variants goes into a suite of the experiment's name, and single options of
a model, a text and so on into a choice of its group: whoever chooses another suite or model later
chooses it without them. conf/experiment/<name>.yaml names these choices.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from quantline.config.compose import compose, missing_inputs, to_yaml
from quantline.config.grid import suite_yaml
from quantline.config.overrides import for_hydra
from quantline.config.stale import differences
from quantline.config.unasked_changes import check_choice
from quantline.config.validation import validate
from quantline.errors import ConfigError
from quantline.files import write_text

GROUP = "experiment"
NONE = "none"  # the experiment that the repository comes with
SELECTED = re.compile(r"^(\s*- experiment:).*$", re.MULTILINE)
LISTS = ("recipe", "variant")
SECTIONS = ("recipes", "variants")


def write_experiment(
    root: Path,
    name: str,
    overrides: Sequence[str],
    present: Mapping[str, Any],
    replace: bool = False,
) -> list[Path]:
    """Write an experiment's files, and select it in conf/config.yaml.

    Args:
        root: The project's.
        name: Of the experiment.
        overrides: As `quantline compose` takes them.
        present: The content of params.yaml; empty if there is none.
        replace: Whether files of an experiment of that name may be replaced.

    Returns:
        The files of conf/ that were written, relative to the root.

    Raises:
        ConfigError: If the overrides do not compose, name inputs that are not there, leave the
            project's model or texts unasked, or cannot be written as files, or if there is another
            experiment of that name; nothing is written then.
    """
    wanted = compose([f"{GROUP}={NONE}", *overrides], root)
    params = validate(wanted)
    if missing := missing_inputs(params):
        raise ConfigError("\n".join(missing))
    check_choice(present, wanted, overrides, name)
    files = _files(root, name, overrides, wanted)
    for path, text in files.items():
        if path.name != "config.yaml" and _differs(root / path, text):
            own = _is_of(root / path, name)
            if not (replace and own):
                also = "edit it, take its place with --replace, or " if own else ""
                raise ConfigError(
                    f"expected no other file {path}, found one; {also}choose another --name"
                )
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder)
        shutil.copytree(root / "conf", trial / "conf")
        shutil.copy(root / "dvc.yaml", trial)
        for path, text in files.items():
            write_text(trial / path, text)
        changes = differences(params, validate(compose([], trial)))
    others = [change for change in changes if not change.startswith("suite: ")]
    if others:
        raise ConfigError(
            f"these overrides cannot be kept in a file: it would give {'; '.join(others[:3])}; "
            f"write conf/{GROUP}/{name}.yaml yourself"
        )
    for path, text in files.items():
        write_text(root / path, text)
    for path in (root / "conf").glob(f"*/{name}.yaml"):
        if path.relative_to(root) not in files and _is_of(path, name):
            path.unlink()  # of what the experiment was before
    return list(files)


def _is_of(path: Path, name: str) -> bool:
    """Whether a file was written for the experiment of a name."""
    return f"# {_comment(name)}\n" in path.read_text(encoding="utf-8")


def _differs(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") != text


def _files(
    root: Path, name: str, overrides: Sequence[str], wanted: dict[str, Any]
) -> dict[Path, str]:
    """Return path → text of what is to be written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(for_hydra(overrides, root / "conf"))
    choices: dict[str, Any] = {}
    options: dict[str, Any] = {}
    own_suite = False
    for typed, override in zip(overrides, parsed, strict=True):
        key = override.key_or_group
        if key == GROUP or override.package or override.is_delete():
            raise ConfigError(f"expected overrides that set something, found {typed}")
        if (root / "conf" / key).is_dir():
            own_suite |= key in LISTS
            choices[key] = override.value()
            continue
        own_suite |= key.partition(".")[0] in SECTIONS
        place = options
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = override.value()
    files = {}
    if own_suite:
        path = Path(f"conf/suite/{name}.yaml")
        comment = _comment(name)
        text = suite_yaml(name, comment, wanted["recipes"], wanted["variants"])
        inside = {key: options.pop(key) for key in SECTIONS if key in options}
        files[path] = text + _yaml(inside)
        choices["suite"] = name
    for group in sorted(set(options) - {*LISTS, "suite"}):
        if (root / "conf" / group).is_dir():
            base = choices.get(group) or _default(root, group)
            files[Path(f"conf/{group}/{name}.yaml")] = _group_yaml(name, base, options.pop(group))
            choices[group] = name
    lines = [f"# @package _global_\n# {_comment(name)}\ndefaults:"]
    for group, choice in choices.items():
        if group not in LISTS:
            lines.append(f"  - override /{group}: {choice}")
    lines.append("  - _self_\n")
    files[Path(f"conf/{GROUP}/{name}.yaml")] = "\n".join(lines) + _yaml(options)
    config = root / "conf/config.yaml"
    text, found = SELECTED.subn(rf"\1 {name}", config.read_text(encoding="utf-8"))
    if found != 1:
        raise ConfigError(
            f"expected one line `- {GROUP}: ...` among the defaults of {config}, found {found}; "
            f"put `- {GROUP}: {NONE}` after `- _self_`"
        )
    files[Path("conf/config.yaml")] = text
    return files


def _comment(name: str) -> str:
    """Return the first line of a file, by which it is known as one of an experiment's."""
    return f"Written by `quantline init --name {name}`."


def _group_yaml(name: str, base: str, options: dict[str, Any]) -> str:
    """Return the text of a choice of a group that changes options of another one.

    Raises:
        ConfigError: If it were based on itself.
    """
    if base == name:
        raise ConfigError(
            f"expected options of another choice than {name}, which would be that file itself; "
            "choose another --name"
        )
    return f"# {_comment(name)}\ndefaults: [{base}, _self_]\n" + _yaml(options)


def _default(root: Path, group: str) -> str:
    """Return the choice of a group in conf/config.yaml.

    Raises:
        ConfigError: If it names none.
    """
    text = (root / "conf/config.yaml").read_text(encoding="utf-8")
    defaults = yaml.safe_load(text)["defaults"]
    for one in defaults:
        if isinstance(one, dict) and group in one:
            return str(one[group])
    raise ConfigError(
        f"expected a line `- {group}: ...` among the defaults of conf/config.yaml, found none; say "
        f"which choice the options are of: {group}=NAME"
    )


def _yaml(options: dict[str, Any]) -> str:
    if not options:
        return ""
    return "\n" + to_yaml(options)
