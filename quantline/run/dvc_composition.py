"""What happens when DVC composes conf/ for an experiment, in DVC's own process."""

import contextlib
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

from quantline.config.compose import (
    conf_digest,
    missing_inputs,
    present_params,
    project_root,
    register_resolvers,
)
from quantline.config.copied_project import paths_outside_copy
from quantline.config.hydra_errors import in_words
from quantline.config.overrides import check_override
from quantline.config.unasked_changes import check_sweep
from quantline.config.validation import validate
from quantline.errors import ConfigError, Reason
from quantline.messages import plain
from quantline.run.stage import StageRun

EXPERIMENTS = (["exp"], ["experiments"])  # what argv begins with


def register_for_dvc() -> None:
    """Register the resolvers of conf/; the digest, which is asked for once, checks the rest too."""
    from omegaconf import OmegaConf

    register_resolvers()
    for handler in logging.getLogger("dvc").handlers:
        handler.addFilter(say_in_our_words)

    def digest(*, _root_: Any) -> str:
        prepare_or_stop(_root_, sys.argv[1:])
        return conf_digest()

    OmegaConf.register_new_resolver("conf_sha256", digest, replace=True)
    if sys.argv[1:2] in EXPERIMENTS:
        write_git_config_in_utf8()


def write_git_config_in_utf8() -> None:
    """Let DVC write .git/config of an experiment's workspace, whatever letters it has.

    It reads that file in UTF-8 and writes it in ASCII (LocalExecutor._update_git_config), and so
    fails for every project in a folder, or of a user, with other letters.
    """
    from configobj import ConfigObj
    from dvc.repo.experiments.executor import local

    local.ConfigObj = partial(ConfigObj, encoding="utf-8")


def say_in_our_words(record: logging.LogRecord) -> bool:
    """Let DVC say of Hydra's errors what they mean here; a filter of its log."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HydraException | OmegaConfBaseException):
        conf = project_root() / "conf"
        try:
            for override in _asked(_arguments(sys.argv[1:])):
                check_override(override, conf)
            said = f"conf/ does not compose: {in_words(error, conf)}"
        except ConfigError as named:
            said = str(named)
        record.exc_info = None
        record.msg = plain(f"{ConfigError.failure}: {said}")
        record.args = ()
    return True


def prepare_or_stop(config: Any, argv: list[str]) -> None:
    """Do as `prepare` does; its error is a run event and ends DVC, which restores the workspace.

    An exception would reach people wrapped into OmegaConf's and DVC's words.

    Raises:
        SystemExit: With 1.
    """
    with contextlib.chdir(project_root()):
        try:
            prepare(config, argv)
        except ConfigError as error:
            StageRun("compose", None).fail(error.failure, str(error), Reason.CONFIG_INVALID)
            raise SystemExit(1) from None


def prepare(config: Any, argv: list[str]) -> None:
    """Check what DVC has composed, and name inputs so that a copy of the project finds them.

    Args:
        config: OmegaConf's, whose interpolations DVC is about to resolve. Its paths may change.
        argv: What DVC was called with in the project of the working folder.

    Raises:
        ConfigError: If it does not fit the schema, would change the project's model, texts or suite
            unasked, or names inputs that are not there.
    """
    from omegaconf import OmegaConf

    # The digest is being asked for.
    composed: dict[str, Any] = {"conf_sha256": ""}
    for key in config:
        if key != "conf_sha256":
            composed[key] = OmegaConf.select(config, key)
            if OmegaConf.is_config(composed[key]):
                composed[key] = OmegaConf.to_container(composed[key], resolve=True)
    params = validate(composed)
    arguments = _arguments(argv)
    if arguments is not None:
        check_sweep(present_params(), composed, _asked(arguments))
    if missing := missing_inputs(params):
        raise ConfigError("\n".join(missing))
    if getattr(arguments, "queue", False):
        check_queue_can_run(Path.cwd())
    if getattr(arguments, "queue", False) or getattr(arguments, "tmp_dir", False):
        for key, path in paths_outside_copy(composed, Path.cwd()).items():
            OmegaConf.update(config, key, path)


def check_queue_can_run(root: Path) -> None:
    """Check that DVC's own worker can write what git's configuration of a copy has: ASCII alone.

    Raises:
        ConfigError: If it cannot.
    """
    config = root / ".git/config"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    if not (text + str(root.resolve())).isascii():
        raise ConfigError(
            "expected a project whose path and .git/config are in ASCII, which DVC's queue needs, "
            "found other letters; run the experiment with --temp in place of --queue, or several "
            "with `quantline sweep`"
        )


def _arguments(argv: list[str]) -> Any:
    """Return DVC's arguments as DVC reads them; None if it was not called as `dvc exp`."""
    from dvc.cli import DvcParserError, parse_args

    if argv[:1] not in EXPERIMENTS:
        return None
    try:
        return parse_args(argv)
    except (DvcParserError, SystemExit):
        return None


def _asked(arguments: Any) -> list[str]:
    """Return the overrides for params.yaml."""
    from dvc.utils.cli_parse import to_path_overrides

    if arguments is None:
        return []
    overrides = to_path_overrides(getattr(arguments, "set_param", None) or [])
    return list(overrides.get("params.yaml", []))
