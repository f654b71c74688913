"""What a GGUF file is called, and what it says of the model's name, size, terms and origin.

Names and keys are those that the Hub, llama.cpp, Ollama and LM Studio go by:
<Model>-<Size>-<Finetune>-<Version>-Q4_K_M.gguf (gguf's `naming_convention`), and general.* of the
GGUF specification.
"""

import math
import re
from typing import NamedTuple

import gguf

from quantline.formats.gguf.architectures import gguf_names, group_by_gguf_name, is_stacked
from quantline.formats.gguf.vocabulary import name_in_file
from quantline.model.gguf_files import PROJECTOR, SUFFIX
from quantline.model.origin import Origin, read_origin
from quantline.model.tensor_source import TensorSource
from quantline.text.tokenizer import Tokenizer

QUANTIZED_BY = "quantline"
UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")  # in the name of a file that travels
LONGEST = 120  # characters of a name, so that a part's number and a suffix fit beside it


class ModelNames(NamedTuple):
    """What a file says of its model, whichever types its tensors have, and how files are called.

    Attributes:
        metadata: For the keys general.*.
        stem: What the names of all files of the model begin with.
    """

    metadata: gguf.Metadata
    stem: str

    def file(self, encoding: str) -> str:
        """Return the name of the file; the encoding is that of its types, such as Q4_K_M."""
        return f"{self.stem}-{encoding}{SUFFIX}"

    @property
    def projector(self) -> str:
        """The name of the file that makes tokens of images and sound."""
        return f"{PROJECTOR}{self.stem}{SUFFIX}"


def names_of(source: TensorSource) -> ModelNames:
    """Return how a model is called.

    Args:
        source: Whose folder has the manifest that load wrote.
    """
    origin = read_origin(source.folder)
    parameters, size = _size_of(source)
    name = _safe(origin.name)
    owner = (origin.hub_id or "").rpartition("/")[0]
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(),
        model_card=_card(origin),
        # Under this key the package looks for an id that it takes apart.
        hf_params={"_name_or_path": f"{owner}/{name}" if owner else name},
        total_params=parameters,
    )
    found.name = found.name or name
    found.size_label = found.size_label or size
    found.quantized_by = QUANTIZED_BY
    # Where the package takes no parts out of a name, it stays as it is written.
    stem = gguf.naming_convention(
        name, found.basename, found.finetune, found.version, found.size_label, None
    )
    return ModelNames(found, _safe(stem))


def _safe(stem: str) -> str:
    """Return a name as any system takes it, and that is not that of another kind of file."""
    safe = UNSAFE.sub("-", stem).strip("-.")[:LONGEST]
    if not safe:
        return "model"
    return f"model-{safe}" if safe.startswith(PROJECTOR) else safe


def _card(origin: Origin) -> dict[str, object]:
    """Return the card that a file made of this model has, under the Hub's keys."""
    card: dict[str, object] = {
        "license": origin.license,
        "license_name": origin.license_name,
        "license_link": origin.license_link,
        "base_model": origin.hub_id,
        "language": list(origin.languages),
    }
    return {key: value for key, value in card.items() if value}


def _size_of(source: TensorSource) -> tuple[int, str]:
    """Return the number of a model's parameters, and the label that llama.cpp makes of it."""
    shared = 0
    of_experts = 0
    experts = 0
    for names in group_by_gguf_name(gguf_names(source)).values():
        size = math.prod(source.shape(names[0]))
        if is_stacked(names):
            of_experts += size
            experts = max(experts, len(names))
        else:
            shared += size
    total = shared + experts * of_experts
    return total, gguf.size_label(total, shared, of_experts, experts)


def write_metadata(writer: gguf.GGUFWriter, metadata: gguf.Metadata, tokenizer: Tokenizer) -> None:
    """Write name, size, terms and origin into a file."""
    assert metadata.name is not None
    named = gguf.Metadata(**vars(metadata))
    named.name = name_in_file(tokenizer, metadata.name)
    named.set_gguf_meta_model(writer)
