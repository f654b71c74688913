"""`convert_hf_to_gguf.py` of llama.cpp, and running it.

It is code of the release that is linked, or of a checkout that the user names, never code from the
checkpoint. It runs as a process of its own: in this Python, on a folder of links to what load has
checked (which holds no code), without the Hub, and with only the environment variables that a
process needs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantline.config.params import AUTO
from quantline.config.texts import Limits
from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_file, sha256_json
from quantline.formats.gguf.converter import driver
from quantline.formats.gguf.converter.release import ORIGIN, SCRIPT, release_converter
from quantline.run.child_process import run_watched
from quantline.run.leash import leashed

PARTS = ("conversion", "gguf-py/gguf")  # of the checkout that the script consists of
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
LAST_LINES = 6  # of the converter's output that an error quotes


def find_script(converter: str) -> Path:
    """Return the script of a converter.

    Args:
        converter: auto for that of the llama.cpp that is linked, a checkout, or the script itself.

    Raises:
        StageError: missing_file; as `release_converter` does.
    """
    if converter == AUTO:
        return release_converter() / SCRIPT
    script = Path(converter) / SCRIPT if Path(converter).is_dir() else Path(converter)
    if not script.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected a checkout of llama.cpp with {SCRIPT}, or that script, at {converter} "
            "(model.converter), found none; give its path, or take model.converter=auto",
        )
    return script.resolve()


def provenance(script: Path) -> dict[str, Any]:
    """Return where a script is from.

    Returns:
        {sha256 of the script and its parts}, with {package, version} of a release, or {path, commit
        of the checkout or None}.
    """
    code = [script]
    for part in PARTS:
        code += (script.parent / part).rglob("*.py")
    hashes = {path.relative_to(script.parent).as_posix(): sha256_file(path) for path in code}
    described = {"sha256": sha256_json(hashes)}
    origin = script.parent / ORIGIN
    if origin.is_file():
        release = read_json(origin)
        return described | {key: release[key] for key in ("package", "version")}
    return described | {"path": str(script), "commit": _commit(script.parent)}


def _commit(folder: Path) -> str | None:
    """Return the commit of a checkout; None for a folder that is no checkout's root."""
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except (FileNotFoundError, PermissionError):  # no git
        return None
    root, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(root) == folder else None


def run_script(script: Path, given: Path, model: Path, output: Path, options: list[str]) -> None:
    """Have the script convert a model.

    Args:
        script: From `find_script`.
        given: What driver.py reads.
        model: A folder that the script may see.
        output: The file that it has to write.
        options: Further ones of the script.

    Raises:
        StageError: converter_failed, with its last words.
    """
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, str(Path(driver.__file__).resolve()), str(script), str(given)]
    command += [str(model), "--outfile", str(output), *options]
    ended = run_watched(
        command,
        Limits(seconds=None),  # the stage has limits of its own
        "the converter",
        cwd=model,
        env=environment,
        preexec_fn=leashed(),
    )
    if ended.code or not output.is_file():
        how = f"exit code {ended.code}" if ended.code else "no file written"
        quoted = "\n".join(ended.errors.strip().splitlines()[-LAST_LINES:])
        raise StageError(
            Failure.CONVERTER_FAILED,
            f"expected {script} to convert the model, found {how}: it does not know this model, or "
            "config.json lacks a key that it asks for; take another format, or a newer checkout of "
            f"llama.cpp (model.converter); its last words: {quoted or 'none'}",
        )
