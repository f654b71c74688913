"""The file that llama.cpp's converter makes of a checkpoint, made once for all GGUF variants.

It lies in a folder beside the checkpoint's with a note of all that it was made from. It is made
again when any of that has changed: it is neither a result nor part of one, so DVC does not know it.
"""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.files import known_sha256, read_json, sha256_files, write_json
from quantline.folders import atomic_folder
from quantline.formats.gguf.converter.origins import find_origins
from quantline.formats.gguf.converter.script import find_script, provenance, run_script
from quantline.messages import say
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import weight_map
from quantline.model.gguf_checkpoint import (
    FILE,
    NOTE,
    PROJECTOR,
    GgufCheckpoint,
    conversion_folder,
)

CODE = Path(__file__).resolve().parents[1]  # of quantline, that the file depends on
FLOAT_TYPES = ("F32", "F16", "BF16")
# Layers that draft tokens for the others, as checkpoints name them beside the decoder's blocks.
DRAFT = re.compile(r"(^|\.)(mtp|nextn)")
TOWERS = ("vision_config", "audio_config")  # in the config.json of a wrapper


def conversion_of(folder: Path, converter: str) -> GgufCheckpoint:
    """Return the converter's file of a checkpoint, made anew if anything has changed since.

    Args:
        folder: The checkpoint.
        converter: auto, a checkout of llama.cpp, or its script.

    Raises:
        StageError: As `find_script` and `convert` do.
    """
    script = find_script(converter)
    checkpoint = Checkpoint(folder)
    key = made_from(checkpoint, script)
    target = conversion_folder(folder)
    note = read_json(target / NOTE) if (target / NOTE).is_file() else {}
    if note.get("made_from") != key or not (target / FILE).is_file():
        say(f"converting {folder} by {script}")
        with atomic_folder(target) as new:
            write_json(new / NOTE, {"made_from": key} | convert(checkpoint, script, new))
    return GgufCheckpoint(folder)


def made_from(checkpoint: Checkpoint, script: Path) -> dict[str, Any]:
    """Return all that a converter's file depends on, as JSON.

    Size and time of change stand for the content of the weights.
    """
    files = (path for path in checkpoint.folder.iterdir() if path.is_file())
    small = sorted(path for path in files if path.suffix != ".safetensors")
    return {
        "weights": checkpoint.stamp(),
        "files": {path.name: known_sha256(path) for path in small},
        "converter": provenance(script),
        "code": sha256_files(CODE, sorted(CODE.rglob("*.py"))),
    }


def convert(checkpoint: Checkpoint, script: Path, target: Path) -> dict[str, Any]:
    """Have a converter make its file, in the dtype of the checkpoint, and check it.

    Args:
        checkpoint: The model.
        script: The converter.
        target: The folder for its file.

    Returns:
        {step: for the manifest's transforms, origins: as `find_origins` returns them}.

    Raises:
        StageError: converter_failed, non_finite, tokenizer_mismatch.
    """
    target = target.resolve()  # the converter runs in another folder
    dtype = checkpoint.stored_dtype(checkpoint.arch.embedding).lower()
    # The converter sees links in a folder of its own, whose name gets into the file.
    with tempfile.TemporaryDirectory(dir=target) as temporary:
        model = Path(temporary) / "model"
        model.mkdir()
        for path in checkpoint.folder.iterdir():
            if path.is_file():
                (model / path.name).symlink_to(path.resolve())
        given = Path(temporary) / "given.json"
        vocabulary, problem = _write_vocabulary(checkpoint, Path(temporary) / "vocabulary.gguf")
        taken_for = Path(temporary) / "class"
        words = describe(checkpoint) | {
            "vocabulary": str(vocabulary) if vocabulary else None,
            "taken_for": str(taken_for),
        }
        given.write_text(json.dumps(words), encoding="utf-8")
        try:
            run_script(script, given, model, target / FILE, ["--outtype", dtype])
        except StageError as error:
            if problem is None:
                raise
            # The converter's own vocabulary was the last hope for a tokenizer without an equal.
            raise StageError(problem.failure, f"{problem} ({error})") from None
        taken = taken_for.read_text(encoding="utf-8") if taken_for.is_file() else None
        without = None
        if has_towers(checkpoint):
            without = _add_projector(script, given, model, target, dtype)
    converted = _open(checkpoint.folder, target)
    check_conversion(converted)
    step = {"step": "convert", **provenance(script), "outtype": dtype}
    step["vocabulary"] = "quantline" if vocabulary else "converter"
    if taken:
        step["taken_for"] = taken
    if without:
        step["without_projector"] = without
    return {"step": step, "origins": find_origins(converted)}


def has_towers(checkpoint: Checkpoint) -> bool:
    """Whether a model has more than a text decoder."""
    return any(checkpoint.config.get(tower) for tower in TOWERS)


def _write_vocabulary(checkpoint: Checkpoint, path: Path) -> tuple[Path | None, StageError | None]:
    """Write the tokenizer as quantline's own files have it; else say why there is none."""
    from quantline.formats.gguf.vocabulary import write_vocabulary
    from quantline.text.tokenizer import Tokenizer

    writer = gguf.GGUFWriter(path, "vocabulary")
    rows = checkpoint.shape(checkpoint.arch.embedding)[0]
    try:
        write_vocabulary(writer, Tokenizer(checkpoint.folder), rows)
    except StageError as error:
        if error.failure != Failure.TOKENIZER_MISMATCH:
            raise
        return None, error
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path, None


def _add_projector(script: Path, given: Path, model: Path, target: Path, dtype: str) -> str | None:
    """Convert what a wrapper has beside its text model; return why that is not to be had."""
    try:
        run_script(script, given, model, target / PROJECTOR, ["--mmproj", "--outtype", dtype])
    except StageError as error:
        if error.failure != Failure.CONVERTER_FAILED:
            raise
        return str(error)
    return None


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what driver.py has to know of a checkpoint: see there."""
    stored = weight_map(checkpoint.folder)
    # Copies of a tied head, and buffers that config.json determines, belong to no tensor.
    renamed: dict[str, str | None] = dict.fromkeys(set(stored) - set(checkpoint.passed))
    for name in checkpoint.names:
        view = checkpoint.view_of(name)
        keys = view.keys if view is not None else (checkpoint.keys[name],)
        for key in keys:
            renamed.pop(key, None)
        is_embedding = name == checkpoint.arch.embedding and len(keys) == 1
        if (view is None or is_embedding) and keys[0] != name:
            renamed[keys[0]] = name
    blocks = checkpoint.arch.layers
    drafts = [name for name in stored if DRAFT.search(name) or _block(checkpoint, name) >= blocks]
    return {"renamed": renamed, "without_draft": not drafts}


def _block(checkpoint: Checkpoint, name: str) -> int:
    """Return the block that a tensor belongs to; -1 for what is around the blocks."""
    index = checkpoint.arch.layer_index(name)
    return -1 if index is None else index


def _open(folder: Path, target: Path) -> GgufCheckpoint:
    """Read what a converter wrote. Raises StageError: converter_failed, if that is no GGUF file."""
    try:
        return GgufCheckpoint(folder, target)
    except Exception as error:  # the reader fails in as many ways as a file can be damaged
        raise_if_of_machine(error)
        raise wrong("a GGUF file", f"one that cannot be read: {error}") from None


def check_conversion(converted: GgufCheckpoint) -> None:
    """Check what a converter wrote: the types, the height of the embedding, finite values.

    Raises:
        StageError: converter_failed, non_finite.
    """
    checkpoint = converted.checkpoint
    embedding = converted.arch.embedding
    rows = checkpoint.shape(checkpoint.arch.embedding)
    if embedding not in converted:
        raise wrong(f"{embedding} {rows}", "no such tensor")
    if converted.shape(embedding) != rows:
        raise wrong(f"{embedding} {rows}", converted.shape(embedding))
    for name in converted.names:
        kind = converted.stored_type(name)
        if kind not in FLOAT_TYPES:
            raise wrong(f"{name} in {', '.join(FLOAT_TYPES)}", kind)
        if not np.isfinite(converted.tensor(name)).all():
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite weights, found NaN or infinity in {name}, as the converter "
                "made it; take a newer checkout of llama.cpp",
            )
    if not any(field.startswith(gguf.Keys.Tokenizer.LIST) for field in converted.fields):
        raise wrong("a tokenizer in the file", "none")


def wrong(expected: str, found: object) -> StageError:
    """Return the error for a file that a converter wrote."""
    return StageError(
        Failure.CONVERTER_FAILED,
        f"expected the converter to write {expected}, found {found}; take another format, or a "
        "newer checkout of llama.cpp (model.converter)",
    )
