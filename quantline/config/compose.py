"""params.yaml: reading it, composing it from conf/ with Hydra, and noticing when it has fallen behind conf/.

`dvc repro` does not compose, so params.yaml can fall behind conf/. It therefore carries `conf_sha256`, the digest of
the conf/ folder that it was composed from: see `check_fresh`.
"""

import hashlib
import re
from pathlib import Path

import yaml

from quantline.config.params import (
    Calibration,
    Evaluation,
    Gate,
    Limits,
    Model,
    Optimize,
    Params,
    Speed,
    Target,
    Text,
    Tracking,
    Variant,
)
from quantline.config.recipes import RECIPES, AnyRecipe, Recipe
from quantline.config.section import ConfigError
from quantline.config.validation import unknown_key, validate

__all__ = ["RECIPES", "AnyRecipe", "Calibration", "ConfigError", "Evaluation", "Gate", "Limits", "Model", "Optimize", "Params", "Recipe",
           "Speed", "StaleError", "Target", "Text", "Tracking", "Variant", "as_yaml", "check_fresh", "compose", "conf_digest",
           "differences", "flat", "load_params", "missing_inputs", "project_root", "register_resolvers", "validate"]

ABSENT = "absent"  # a value that no key of params.yaml has
MEND = "run `quantline compose` (with your overrides, if any), then `dvc repro`"


class StaleError(ConfigError):
    """conf/ has changed since params.yaml was composed from it."""


def project_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the working folder) that holds dvc.yaml and conf/."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "conf").is_dir():
            return folder
    raise ConfigError(f"expected dvc.yaml and conf/ at or above {start}; run this inside the project")


def conf_digest(root: Path | None = None) -> str:
    """sha256 over the names and bytes of all YAML files under conf/."""
    conf, digest = project_root(root) / "conf", hashlib.sha256()
    for path in sorted(conf.rglob("*.yaml")):
        digest.update(f"{path.relative_to(conf).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def register_resolvers(root: Path | None = None) -> None:
    """Make known what conf/ asks for: `${conf_sha256:}` and `${first:a,b}` (the first value that is not null)."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("conf_sha256", lambda: conf_digest(root), replace=True)
    OmegaConf.register_new_resolver("first", lambda *values: next((one for one in values if one is not None), None),
                                    replace=True)


def compose(overrides: list[str] | tuple[str, ...] = (), root: Path | None = None) -> dict:
    """conf/ composed by Hydra with the given overrides, as plain values that fit the schema.

    Raises ConfigError with Hydra's own words if it does not compose, or with ours if it does not fit.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = project_root(root)
    try:
        with initialize_config_dir(str(folder / "conf"), version_base=None):
            register_resolvers(folder)
            composed = OmegaConf.to_container(hydra_compose("config", overrides=list(overrides)), resolve=True,
                                              throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"conf/ does not compose: {_plain(error)}") from error
    validate(composed)
    return composed


def _plain(error: Exception) -> str:
    """Hydra's and OmegaConf's words, or ours for a key that nobody knows and for a `???` that is left to the person."""
    if "MissingMandatoryValue" in f"{type(error).__name__} {error}":
        return f"{error.full_key} has no value; give one: {error.full_key}=..."
    if named := re.match(r"Could not override '([\w.-]+)'", str(error)):
        return unknown_key(named[1]) or str(error)
    return str(error).strip()


def as_yaml(composed: dict) -> str:
    """The text of params.yaml: values in the order and form in which `dvc exp run` writes them."""
    return ("# Composed from conf/ by `quantline compose`: edit conf/, not this file.\n"
            + yaml.safe_dump(composed, sort_keys=False, allow_unicode=True))


def missing_inputs(params: Params) -> list[str]:
    """The local paths that the parameters name and that are not there, as `key: ...` lines."""
    model, calibration, evaluation = params.model, params.calibration, params.evaluation
    named = {"model.path": model.path if model.source != "hub" else None, "model.adapter": model.adapter,
             "calibration.path": calibration.path if calibration.source == "file" else None,
             "evaluation.path": evaluation.path if evaluation.source == "file" else None,
             "evaluation.gold": evaluation.gold}
    return [f"{key}: there is no {path}" for key, path in named.items() if path and not Path(path).exists()]


def load_params(path: Path | str = "params.yaml") -> Params:
    """The typed content of params.yaml. Raises ConfigError."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}; {MEND}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"expected keys and values in {path}, found {type(values).__name__}; {MEND}")
    return validate(values)


def check_fresh(params: Params, root: Path | None = None) -> None:
    """Raise StaleError if conf/ was edited after params.yaml was composed.

    Comparing values would call every override (`dvc exp run -S recipes.x.bits=3`) stale. The digest compares what
    params.yaml was composed *from*: an override leaves conf/ alone, an edit does not. DVC's own composition evaluates
    the digest too, through hydra_plugins/.
    """
    if params.conf_sha256 == conf_digest(root):
        return
    try:
        # The choices that params.yaml names are asked for again: they are no staleness, and would hide what is.
        what = differences(params, validate(compose([f"suite={params.suite}", f"target={params.target.name}"], root)))
    except ConfigError as error:
        raise StaleError(f"params.yaml is stale: conf/ was edited after it was composed, and now {error}") from error
    told = f" ({'; '.join(what[:3])}{f'; and {len(what) - 3} more' if len(what) > 3 else ''})" if what else ""
    raise StaleError(f"params.yaml is stale: conf/ was edited after it was composed{told}; {MEND}")


def differences(before: Params, after: Params) -> list[str]:
    """What changes from one set of parameters to another, as `key: old -> new` lines."""
    old, new = (flat(params.model_dump(mode="json", exclude={"conf_sha256"})) for params in (before, after))
    return [f"{key}: {old.get(key, ABSENT)!r} -> {new.get(key, ABSENT)!r}"
            for key in sorted(old.keys() | new.keys()) if old.get(key, ABSENT) != new.get(key, ABSENT)]


def flat(values: dict, separator: str = ".", prefix: str = "") -> dict:
    """Nested values by the path to each, such as `model.id`."""
    found = {}
    for key, value in values.items():
        place = f"{prefix}{key}"
        found |= flat(value, separator, place + separator) if isinstance(value, dict) else {place: value}
    return found
