"""The small files of a checkpoint: its tokenizer and configurations, without weights."""

import json
import shutil
from pathlib import Path
from typing import Any

from quantline.ingest.settle_tokenizer import settle_tokenizer
from quantline.model.checkpoint_files import side_files
from tests.helpers.models import write_tokenizer

ROWS = 400  # of the embedding: a few more than the 384 tokens


def write_files(folder: Path, **files: dict[str, Any] | str | None) -> Path:
    """Write a byte-level tokenizer of three special tokens, and files over it.

    Args:
        folder: Where to.
        files: Name without its end → JSON that is merged over what is there, the text of a file,
            or None for no such file. Files of text end in .jinja, others in .json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": ROWS}))
    for stem, content in files.items():
        if content is None:
            for path in folder.glob(f"{stem}.*"):
                path.unlink()
        elif isinstance(content, str):
            (folder / f"{stem}.jinja").write_text(content)
        else:
            path = folder / f"{stem}.json"
            before = json.loads(path.read_text()) if path.is_file() else {}
            path.write_text(json.dumps(before | content))
    return folder


def tokenizer_config(**changes: Any) -> dict[str, Any]:
    """Return changes of tokenizer_config.json as `write_files` takes them."""
    return {"tokenizer_config": changes}


def begin_with(folder: Path, *tokens: str, end: str | None = None) -> Path:
    """Let the tokenizer put tokens before every text, and one behind."""
    from tokenizers import Tokenizer, processors

    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    around = " ".join([*tokens, "$A", *([end] if end else [])])
    named = {*tokens, *([end] if end else [])}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, tokenizer.token_to_id(token)) for token in named]
    )
    tokenizer.save(path)
    return folder


def brought(origin: Path, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Bring the small files of a checkpoint as load does; return the folder and its steps."""
    folder.mkdir(parents=True)
    for name in side_files(origin):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(origin / name, folder / name)
    return folder, settle_tokenizer(origin, folder)
