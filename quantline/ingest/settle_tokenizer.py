"""Writing down what transformers makes of a checkpoint's tokenizer, so that every reader agrees.

tokenizers, onnxruntime and llama.cpp's converter read tokenizer.json; transformers may build
another tokenizer than that file says. Here the file becomes what transformers serves with.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_text
from quantline.text import transformers_tokenizer
from quantline.text.special_tokens import describe_differences, write_special_tokens
from quantline.text.transformers_tokenizer import Answer

FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
PROCESSOR_TEMPLATE = "chat_template.json"  # of models with images, and read by llama.cpp too


def settle_tokenizer(origin: Path, folder: Path) -> list[dict[str, Any]]:
    """Make the tokenizer of a folder the one that transformers has for a checkpoint.

    Args:
        origin: The checkpoint, as its maker left it.
        folder: The small files that were brought from there; special_tokens.json is written here.

    Returns:
        The steps for the manifest's transforms; none for most checkpoints.

    Raises:
        StageError: as `transformers_tokenizer.ask` does; tokenizer_mismatch, if the folder does not
            give the checkpoint's tokenizer.
    """
    wanted = transformers_tokenizer.ask(origin)
    steps = []
    if step := _write_tokenizer(wanted, folder):
        steps.append(step)
    if not wanted.special.templates and (step := _write_template(folder)):
        steps.append(step)
    found = transformers_tokenizer.ask(folder)
    if any(step["step"] == "convert_chat_template" for step in steps):
        special = found.special
    else:
        special = wanted.special
    _compare(wanted._replace(special=special), found, origin)
    write_special_tokens(folder, found.special)
    return steps


def _write_tokenizer(wanted: Answer, folder: Path) -> dict[str, Any] | None:
    """Write tokenizer.json if there is none, or if it is not what transformers encodes with."""
    path = folder / FILE
    step = {"step": "convert_tokenizer", "class": wanted.kind}
    if path.is_file():
        parts = transformers_tokenizer.differing_parts(_read(path), wanted.spec)
        begins = _begins_alike(path, wanted)
        if not parts and begins:
            return None
        step["changed"] = ", ".join(parts if begins else [*parts, "post_processor"])
    transformers_tokenizer.tokenizer_of(folder, wanted.spec).save(str(path))
    return step


def _read(path: Path) -> dict[str, Any]:
    """Return a tokenizer.json as this version of tokenizers writes it."""
    try:
        spec: dict[str, Any] = json.loads(FastTokenizer.from_file(str(path)).to_str())
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise_if_of_machine(error)
        raise StageError(
            Failure.MISSING_TOKENIZER,
            f"expected a readable {path}: {error}; copy the one that the model was trained with",
        ) from None
    return spec


def _begins_alike(path: Path, wanted: Answer) -> bool:
    """Whether the file puts the same tokens around a text as transformers does."""
    tokenizer = FastTokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in transformers_tokenizer.SAMPLES:
        bare = tokenizer.encode(text, add_special_tokens=False).ids
        special = wanted.special
        if tokenizer.encode(text).ids != special.begin + bare + special.finish:
            return False
    return True


def _write_template(folder: Path) -> dict[str, Any] | None:
    """Write the template of chat_template.json where tokenizers look for one."""
    path = folder / PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    template = read_json(path).get("chat_template")
    if not isinstance(template, str):
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected the text of a template for chat_template in {path}, found "
            f"{template!r:.80}; mend the file, or leave it out",
        )
    write_text(folder / TEMPLATE, template)
    return {"step": "convert_chat_template", "from": PROCESSOR_TEMPLATE}


def _compare(wanted: Answer, found: Answer, origin: Path) -> None:
    """Check that the folder's tokenizer is the checkpoint's. Raises tokenizer_mismatch."""
    differences = list(describe_differences(wanted.special, found.special))
    for part in transformers_tokenizer.differing_parts(wanted.spec, found.spec):
        differences.append(f"another {part}")
    if differences:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected the files brought from {origin} to give its own tokenizer in transformers, "
            f"a {wanted.kind}, found a {found.kind} with {'; '.join(differences)}; save it with "
            "save_pretrained, or set tokenizer_class in tokenizer_config.json to "
            "TokenizersBackend, which takes tokenizer.json as it is",
        )
