"""What people say of their project, as overrides: a model, texts, questions, a target, a suite.

A model or a text can be a choice of conf/, something on this machine, or something on the Hub.
"""

import re
from pathlib import Path

from quantline.config.catalogue import names_of
from quantline.config.overrides import near
from quantline.errors import ConfigError

DEMO = "demo"
HUB = "hub"
NO_GOLD = "none"
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
CONFIG = "config.json"  # which every model's folder has
WHOLE = "[0.0,1.0]"


def model_overrides(said: str, root: Path) -> list[str]:
    """Return the overrides for a model.

    Args:
        said: A choice of conf/model, a folder or GGUF file, or a Hub id, with @revision or without.
        root: The project's.

    Raises:
        ConfigError: If it is none of these.
    """
    if said in _ready(root, "model"):
        return [f"model={said}"]
    folder = Path(said).expanduser()
    if said and folder.is_dir() and not (folder / CONFIG).is_file():
        raise ConfigError(
            f"model: expected the folder of a model, with {CONFIG}, found none in {said}; name the "
            "folder that has it"
        )
    if said and folder.exists():
        return ["model=local", f"model.path={_path(said, root)}"]
    if _looks_like_a_path(said):
        raise ConfigError(f"model: there is no {said}; correct the path")
    if found := HUB_ID.fullmatch(said):
        revision = [f"model.revision={found[2]}"] if found[2] else []
        return ["model=hub", f"model.id={found[1]}", *revision]
    raise _unknown("model", said, root)


def text_overrides(group: str, said: str, root: Path) -> list[str]:
    """Return the overrides for a text.

    Args:
        group: "calibration" or "evaluation".
        said: A choice of conf/, a file, or the id of a data set on the Hub.
        root: The project's.

    Raises:
        ConfigError: If it is none of these.
    """
    if said == HUB or said in _ready(root, group):
        return [f"{group}={said}"]
    path = Path(said).expanduser()
    if path.is_file():
        return [f"{group}=file", f"{group}.path={_path(said, root)}"]
    if path.is_dir():
        raise ConfigError(f"{group}: expected a file, found the folder {said}; join its files")
    if _looks_like_a_path(said):
        raise ConfigError(f"{group}: there is no {said}; correct the path")
    if HUB_ID.fullmatch(said):
        return [f"{group}=hub", f"{group}.dataset={said}", f"{group}.dataset_config=null"]
    raise _unknown(group, said, root)


def project_overrides(
    root: Path,
    model: str | None = None,
    calibration: str | None = None,
    evaluation: str | None = None,
    gold: str | None = None,
    target: str | None = None,
    suite: str | None = None,
) -> list[str]:
    """Return all that was said as overrides; what was not said stays as conf/ has it.

    Where both texts are one file, its first half is calibrated on and its second half evaluated
    on; two files are taken whole.

    Args:
        root: The project's.
        model: As in `model_overrides`.
        calibration: As in `text_overrides`; with a model of one's own it is needed.
        evaluation: The same; by default the other half of the calibration's file, or WikiText-2
            where that is calibrated on.
        gold: A file of questions; "none" for none.
        target: A choice of conf/target.
        suite: A choice of conf/suite.

    Raises:
        ConfigError: If something is not there, or a model has no texts.
    """
    overrides = []
    if model is not None:
        overrides += model_overrides(model, root)
        if model != DEMO and calibration is None:
            raise ConfigError(
                f"expected a text for {model}, found none: the demo's texts suit no other model; "
                "give --calibration FILE, or --calibration hub for WikiText-2"
            )
    if model == DEMO:
        calibration = calibration or DEMO
        evaluation = evaluation or DEMO
    if evaluation is None and calibration not in (None, DEMO, "demo-chat"):
        evaluation = calibration
    if calibration is not None:
        overrides += text_overrides("calibration", calibration, root)
    if evaluation is not None:
        overrides += text_overrides("evaluation", evaluation, root)
    files = {"calibration=file", "evaluation=file"} & set(overrides)
    shared = len(files) == 2 and _same_file(calibration, evaluation)
    if not shared:
        overrides += [f"{one.partition('=')[0]}.part={WHOLE}" for one in sorted(files)]
    if gold is not None:
        overrides.append(f"evaluation.gold={_gold(gold, root)}")
    for group, said in (("target", target), ("suite", suite)):
        if said is not None:
            if said not in names_of(root, group):
                raise _unknown(group, said, root)
            overrides.append(f"{group}={said}")
    return overrides


def _gold(said: str, root: Path) -> str:
    """Return the path of a gold set, or null for none. Raises ConfigError."""
    if said == NO_GOLD:
        return "null"
    if not Path(said).expanduser().is_file():
        raise ConfigError(
            f"gold: there is no {said}; correct the path, or say {NO_GOLD} for no questions"
        )
    return _path(said, root)


def _ready(root: Path, group: str) -> list[str]:
    """Return the choices that need no further word."""
    return [name for name in names_of(root, group) if name not in ("local", HUB, "file")]


def _looks_like_a_path(said: str) -> bool:
    return said.startswith(("/", "./", "../", "~")) or said.endswith((".gguf", ".txt", ".jsonl"))


def _path(said: str, root: Path) -> str:
    """Return a path as conf/ keeps it: relative inside the project, else whole."""
    path = Path(said).expanduser().resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _same_file(one: str | None, other: str | None) -> bool:
    return bool(one and other) and Path(str(one)).resolve() == Path(str(other)).resolve()


def _unknown(group: str, said: str, root: Path) -> ConfigError:
    names = names_of(root, group)
    also = {
        "model": "a folder, a GGUF file, owner/name on the Hub, or one of ",
        "calibration": "a file, owner/name of a data set on the Hub, or one of ",
        "evaluation": "a file, owner/name of a data set on the Hub, or one of ",
    }.get(group, "one of ")
    return ConfigError(
        f"{group}: expected {also}{', '.join(names)}, found {said}{near(said, names)}"
    )
