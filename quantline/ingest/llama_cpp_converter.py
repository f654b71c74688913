"""The user's own converter: `convert_hf_to_gguf.py` of a checkout of llama.cpp, which knows many architectures.

It is code that the user names, not code from the checkpoint, and it runs as a process of its own: in this Python, on
the folder that load has checked (which holds no code), without the Hub, and with none of the environment's variables
but those that a process needs.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantline.model.architecture import architecture
from quantline.model.gguf_checkpoint import FILE, FLOATS, Converted
from quantline.model.checkpoint import Checkpoint
from quantline.errors import Failure, StageError
from quantline.files import sha256_file, sha256_json

SCRIPT = "convert_hf_to_gguf.py"
PARTS = ("conversion", "gguf-py/gguf")  # that the script consists of, where the checkout has them
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LD_LIBRARY_PATH")
LINES = 6  # of what a converter said last that are told


def find(path: str) -> Path:
    """The script of a checkout, or the script itself. Raises StageError(missing_file)."""
    script = Path(path) / SCRIPT if Path(path).is_dir() else Path(path)
    if not script.is_file():
        raise StageError(Failure.MISSING_FILE, f"expected a checkout of llama.cpp with {SCRIPT}, or that script, at "
                                               f"{path} (model.converter), found none; give its path")
    return script.resolve()


def provenance(script: Path) -> dict[str, Any]:
    """{path, sha256 of the script and what it consists of, commit of the checkout or None}."""
    code = [script, *(path for part in PARTS for path in (script.parent / part).rglob("*.py"))]
    hashes = {path.relative_to(script.parent).as_posix(): sha256_file(path) for path in code}
    return {"path": str(script), "sha256": sha256_json(hashes), "commit": _commit(script.parent)}


def _commit(folder: Path) -> str | None:
    """The commit of a checkout; None for a folder that is no checkout's root."""
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"], capture_output=True,
                              text=True, check=False)
    except OSError:  # no git
        return None
    root, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(root) == folder else None


def convert(path: str, folder: Path) -> dict[str, Any]:
    """Put the converter's file into a checkpoint's folder, in the dtype of the checkpoint; returns the step for the
    manifest's transforms.

    Raises StageError: missing_file, converter_failed, and as `check` does.
    """
    script, source = find(path), Checkpoint(folder)
    dtype = source.stored_dtype(architecture(source).embedding).lower()
    about = {"step": "convert", **provenance(script), "outtype": dtype}
    folder = folder.resolve()
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(script), str(folder), "--outfile", str(folder / FILE), "--outtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=folder,
                          env=environment, stdin=subprocess.DEVNULL)
    said = "\n".join(done.stderr.strip().splitlines()[-LINES:])
    if done.returncode or not (folder / FILE).is_file():
        how = f"exit code {done.returncode}" if done.returncode else "no file written"
        raise StageError(Failure.CONVERTER_FAILED, f"expected {script} to convert the model, found {how}; its last "
                                                   f"words: {said or 'none'}")
    check(folder)
    return about


def check(folder: Path) -> None:
    """Hold the converter's file against the checkpoint: types, shapes of matrices, the embedding, finite values.

    Raises StageError: converter_failed, non_finite.
    """
    try:
        made = Converted(folder)
    except StageError:
        raise
    except Exception as error:  # noqa: BLE001  the reader fails in as many ways as a file can be damaged
        raise _wrong("a GGUF file", f"one that cannot be read: {error}") from None
    source, embedding = made.source, made.facts.embedding
    rows = architecture(source).embedding
    if embedding not in made.tensors or made.shape(embedding) != source.shape(rows):
        found = made.shape(embedding) if embedding in made.tensors else "no such tensor"
        raise _wrong(f"{embedding} {source.shape(rows)}", found)
    for name in made.names:
        kind, whole = made.tensors[name].tensor_type.name, made.sources.get(name)
        if kind not in FLOATS:
            raise _wrong(f"{name} in {', '.join(FLOATS)}", kind)
        if whole and len(source.shape(whole)) > 1 and made.shape(name) != source.shape(whole):
            raise _wrong(f"{name} {source.shape(whole)}, as {whole} is", made.shape(name))
        if not np.isfinite(made.tensor(name)).all():
            raise StageError(Failure.NON_FINITE, f"expected finite weights, found NaN or infinity in {name}, as the "
                                                 "converter made it")
    if not any(field.startswith(gguf.Keys.Tokenizer.LIST) for field in made.settings):
        raise _wrong("a tokenizer in the file", "none")


def _wrong(expected: str, found: object) -> StageError:
    return StageError(Failure.CONVERTER_FAILED, f"expected the converter to write {expected}, found {found}; take a newer "
                                                "checkout of llama.cpp")
