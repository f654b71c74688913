"""The user's own converter: `convert_hf_to_gguf.py` of a checkout of llama.cpp.

It is code that the user names, not code from the checkpoint. It runs as a process of its own: in
this Python, on the folder that load has checked (which holds no code), without the Hub, and with
only the environment variables that a process needs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.config.texts import Limits
from quantline.errors import Failure, StageError
from quantline.files import sha256_file, sha256_json
from quantline.model.checkpoint import Checkpoint
from quantline.model.gguf_checkpoint import FILE, GgufCheckpoint
from quantline.run.child_process import run_watched
from quantline.run.leash import leashed

SCRIPT = "convert_hf_to_gguf.py"
PARTS = ("conversion", "gguf-py/gguf")  # of the checkout that the script consists of
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
LAST_LINES = 6  # of the converter's output that an error quotes
FLOAT_TYPES = ("F32", "F16", "BF16")


def find_script(path: str) -> Path:
    """Return the script of a checkout, or the script itself. Raises StageError(missing_file)."""
    script = Path(path) / SCRIPT if Path(path).is_dir() else Path(path)
    if not script.is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected a checkout of llama.cpp with {SCRIPT}, or that script, at {path} "
            "(model.converter), found none; give its path",
        )
    return script.resolve()


def provenance(script: Path) -> dict[str, Any]:
    """Return {path, sha256 of the script and its parts, commit of the checkout or None}."""
    code = [script]
    for part in PARTS:
        code += (script.parent / part).rglob("*.py")
    hashes = {path.relative_to(script.parent).as_posix(): sha256_file(path) for path in code}
    return {
        "path": str(script),
        "sha256": sha256_json(hashes),
        "commit": _commit(script.parent),
    }


def _commit(folder: Path) -> str | None:
    """Return the commit of a checkout; None for a folder that is no checkout's root."""
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except (FileNotFoundError, PermissionError):  # no git
        return None
    root, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(root) == folder else None


def convert(path: str, folder: Path) -> dict[str, Any]:
    """Put the converter's file into a checkpoint's folder, in the dtype of the checkpoint.

    Args:
        path: A checkout of llama.cpp, or its script.
        folder: The checkpoint.

    Returns:
        The step for the manifest's transforms.

    Raises:
        StageError: missing_file, converter_failed, and as `check_conversion` does.
    """
    script = find_script(path)
    checkpoint = Checkpoint(folder)
    dtype = checkpoint.stored_dtype(checkpoint.arch.embedding).lower()
    step = {"step": "convert", **provenance(script), "outtype": dtype}
    folder = folder.resolve()
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    output = folder / FILE
    command = [sys.executable, str(script), str(folder)]
    command += ["--outfile", str(output), "--outtype", dtype]
    ended = run_watched(
        command,
        Limits(seconds=None),  # the stage has limits of its own
        "the converter",
        cwd=folder,
        env=environment,
        preexec_fn=leashed(),
    )
    if ended.code or not output.is_file():
        how = f"exit code {ended.code}" if ended.code else "no file written"
        quoted = "\n".join(ended.errors.strip().splitlines()[-LAST_LINES:])
        raise StageError(
            Failure.CONVERTER_FAILED,
            f"expected {script} to convert the model, found {how}; take a newer checkout of "
            "llama.cpp, or add to config.json a key that the script asks for; its last words: "
            f"{quoted or 'none'}",
        )
    check_conversion(folder)
    return step


def check_conversion(folder: Path) -> None:
    """Compare the converter's file with the checkpoint: types, shapes, embedding, finite values.

    Raises:
        StageError: converter_failed, non_finite.
    """
    checkpoint = Checkpoint(folder)  # refused by its own name, before the converter is blamed
    try:
        converted = GgufCheckpoint(folder)
    except StageError as error:
        raise _wrong("a GGUF file", f"one that cannot be read: {error}") from None
    except Exception as error:  # the reader fails in as many ways as a file can be damaged
        raise_if_of_machine(error)
        raise _wrong("a GGUF file", f"one that cannot be read: {error}") from None
    checkpoint = converted.checkpoint
    embedding = converted.arch.embedding
    rows = checkpoint.shape(checkpoint.arch.embedding)
    if embedding not in converted:
        raise _wrong(f"{embedding} {rows}", "no such tensor")
    if converted.shape(embedding) != rows:
        raise _wrong(f"{embedding} {rows}", converted.shape(embedding))
    for name in converted.names:
        kind = converted.tensors[name].tensor_type.name
        if kind not in FLOAT_TYPES:
            raise _wrong(f"{name} in {', '.join(FLOAT_TYPES)}", kind)
        source = converted.checkpoint_names.get(name)
        if source and len(checkpoint.shape(source)) > 1:
            wanted = checkpoint.shape(source)
            if converted.shape(name) != wanted:
                raise _wrong(f"{name} {wanted}, as {source} is", converted.shape(name))
        if not np.isfinite(converted.tensor(name)).all():
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite weights, found NaN or infinity in {name}, as the converter "
                "made it; take a newer checkout of llama.cpp",
            )
    if not any(field.startswith(gguf.Keys.Tokenizer.LIST) for field in converted.fields):
        raise _wrong("a tokenizer in the file", "none")


def _wrong(expected: str, found: object) -> StageError:
    return StageError(
        Failure.CONVERTER_FAILED,
        f"expected the converter to write {expected}, found {found}; take a newer checkout of "
        "llama.cpp",
    )
