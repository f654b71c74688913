"""Composing conf/ into params.yaml with Hydra, and reading params.yaml."""

import contextlib
import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import yaml

from quantline.causes import raise_if_of_machine
from quantline.config.containers import CONTAINERS
from quantline.config.hydra_errors import in_words
from quantline.config.model_name import model_name
from quantline.config.overrides import for_hydra
from quantline.config.params import Params
from quantline.config.recipes import RECIPES
from quantline.config.validation import validate
from quantline.errors import ConfigError
from quantline.files import sha256_files

MEND = "run `quantline compose` (with your overrides, if any), then `dvc repro`"


def project_root(start: Path | None = None) -> Path:
    """Return the nearest folder at or above `start` that holds dvc.yaml and conf/.

    Args:
        start: Where to begin; by default the working folder.

    Raises:
        ConfigError: If there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file() and (folder / "conf").is_dir():
            return folder
    raise ConfigError(f"expected dvc.yaml and conf/ at or above {start}; run this in the project")


def conf_digest(root: Path | None = None) -> str:
    """Return the sha256 over the names and bytes of all YAML files under conf/."""
    conf = project_root(root) / "conf"
    return sha256_files(conf, sorted(conf.rglob("*.yaml")))


def register_resolvers(root: Path | None = None) -> None:
    """Register with OmegaConf what conf/ interpolates.

    `${conf_sha256:}` is the digest of conf/; `${first:a,b}` the first value that is not null;
    `${format_of:recipe}` the container of a variant that names none, and `${runtime_of:format}`
    its runtime; `${model_name:}` what the model is called.
    """
    from omegaconf import DictConfig, OmegaConf

    def digest() -> str:
        return conf_digest(root)

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    # What does not exist is refused by the schema, by its key and with the names there are; until
    # then any format and runtime will do.
    def format_of(recipe: str, *, _root_: Any) -> str:
        recipes = _root_.get("recipes")
        entry = recipes.get(recipe) if isinstance(recipes, DictConfig) else None
        method = str(entry.get("method")) if isinstance(entry, DictConfig) else "none"
        return RECIPES[method if method in RECIPES else "none"].container

    def runtime_of(container: str) -> str:
        return CONTAINERS[container if container in CONTAINERS else "safetensors"].runtime

    def name_of_model(*, _root_: Any) -> str:
        section = _root_.get("model")
        if not isinstance(section, DictConfig):
            return model_name({})
        # What has no value yet is refused by its own key.
        named = ("source", "id", "path", "adapter")
        return model_name(
            {key: section.get(key) for key in named if not OmegaConf.is_missing(section, key)}
        )

    OmegaConf.register_new_resolver("conf_sha256", digest, replace=True)
    OmegaConf.register_new_resolver("first", first, replace=True)
    OmegaConf.register_new_resolver("model_name", name_of_model, replace=True)
    OmegaConf.register_new_resolver("format_of", format_of, replace=True)
    OmegaConf.register_new_resolver("runtime_of", runtime_of, replace=True)


def compose(overrides: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """Compose conf/ with Hydra.

    Args:
        overrides: Hydra's overrides, such as "suite=quick".
        root: Where the project lies; by default at or above the working folder.

    Returns:
        Plain values that fit the schema.

    Raises:
        ConfigError: If conf/ does not compose, or the result does not fit the schema.
    """
    composed = _composed(overrides, root, complete=True)
    validate(composed)
    return composed


def hydra_config(overrides: Sequence[str] = (), root: Path | None = None) -> dict[str, Any]:
    """Compose conf/ with Hydra into plain values, which need not fit the schema.

    What has no value yet is None.

    Args:
        overrides: Hydra's overrides.
        root: Where the project lies; by default at or above the working folder.

    Raises:
        ConfigError: If conf/ does not compose.
    """
    return _composed(overrides, root, complete=False)


def _composed(overrides: Sequence[str], root: Path | None, complete: bool) -> dict[str, Any]:
    """Compose conf/; `complete` is whether every value has to be there."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = project_root(root)
    forms = list(overrides)
    if complete:
        forms = for_hydra(overrides, folder / "conf")
    try:
        with initialize_config_dir(str(folder / "conf"), version_base=None):
            register_resolvers(folder)
            config = hydra_compose("config", overrides=forms)
            if not complete:
                _fill_missing(config)
            container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"conf/ does not compose: {in_words(error, folder / 'conf')}") from error
    except Exception as error:  # a file that is no YAML, or YAML in which Hydra stumbles
        raise_if_of_machine(error)
        name = type(error).__name__
        raise ConfigError(f"conf/ does not compose: {name}: {error}; mend the file") from error
    return cast(dict[str, Any], container)


def _fill_missing(config: Any) -> None:
    """Let what has no value yet be None."""
    from omegaconf import DictConfig, OmegaConf, open_dict

    for key in list(config):
        if OmegaConf.is_missing(config, key):
            with open_dict(config):
                config[key] = None
        elif not OmegaConf.is_interpolation(config, key) and isinstance(config[key], DictConfig):
            _fill_missing(config[key])


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that are numbers to other readers of YAML.

    DVC and OmegaConf take 12e4567, which may be a commit, for a number; PyYAML does not.
    """


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None
    for kind in (float, lambda value: int(value, 0)):
        with contextlib.suppress(ValueError):
            kind(text)
            style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(values: Any) -> str:
    """Return values as YAML that PyYAML, DVC and Hydra read alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_yaml(composed: dict[str, Any]) -> str:
    """Return the text of params.yaml, in the order and form in which `dvc exp run` writes it."""
    return "# Composed from conf/ by `quantline compose`: edit conf/, not this file.\n" + to_yaml(
        composed
    )


@lru_cache(maxsize=8)
def _parsed(text: str) -> Any:
    """Return what YAML says; a stage reads the same parameters before and after its work."""
    return yaml.safe_load(text)


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and check params.yaml. Raises ConfigError."""
    try:
        values = copy.deepcopy(_parsed(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise_if_of_machine(error)
        raise ConfigError(f"cannot read {path}: {error}; {MEND}") from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ConfigError(f"expected keys and values in {path}, found {found}; {MEND}")
    return validate(values)


def present_params() -> dict[str, Any]:
    """Return the content of params.yaml; nothing if there is none that could be read."""
    try:
        values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def missing_inputs(params: Params) -> list[str]:
    """Return the local paths that the parameters name and that do not exist, as `key: ...`."""
    model = params.model
    calibration = params.calibration
    evaluation = params.evaluation
    named = {
        "model.path": model.path if model.source != "hub" else None,
        "model.adapter": model.adapter,
        "calibration.path": calibration.path if calibration.source == "file" else None,
        "evaluation.path": evaluation.path if evaluation.source == "file" else None,
        "evaluation.gold": evaluation.gold,
    }
    return [
        f"{key}: there is no {path}"
        + ("" if Path(path).is_absolute() else f" in {Path.cwd()}")
        + "; correct the path"
        for key, path in named.items()
        if path and not Path(path).exists()
    ]
