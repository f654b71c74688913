"""The types and the importance matrix of a k-quant recipe for one model: what quantize asks for each tensor."""

import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from quantline.model.architecture import Architecture
from quantline.model.gguf_checkpoint import Converted
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.formats.gguf import imatrix
from quantline.formats.gguf.architectures import by_place, container_of, dimensions, tensor_names
from quantline.methods.ggml import mixes
from quantline.config.recipes import KQuant
from quantline.errors import Failure, StageError
from quantline.files import sha256_file


class Mixture:
    """A recipe, looked at tensor by tensor. Names are the source's; llama.cpp's rules see those of the file.

    Raises StageError: unsupported_architecture, config_invalid for an override that fits no tensor or cannot be read,
    and what `imatrix.read` raises.
    """

    def __init__(self, recipe: KQuant, checkpoint: Checkpoint | Converted, facts: Architecture, moments: Moments) -> None:
        self.recipe, self.checkpoint, self.facts, self.moments = recipe, checkpoint, facts, moments
        self.places = tensor_names(checkpoint, facts)
        self.groups = by_place(self.places)
        seventy = facts.layers == 80 and facts.heads != facts.kv_heads and facts.model_type in ("llama", "mistral")
        seventy = seventy or (facts.layers == 80 and facts.model_type == "qwen2")
        self.model = mixes.Model(facts.layers, facts.tied, facts.heads // facts.kv_heads, facts.experts, seventy)
        self.model = replace(self.model, importance=bool(recipe.importance or recipe.importance_file))
        self.patterns = [(self._compiled(pattern), kind) for pattern, kind in recipe.overrides.items()]

    def _compiled(self, pattern: str) -> re.Pattern:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise StageError(Failure.CONFIG_INVALID, f"expected a regular expression among the overrides, found "
                                                     f"{pattern!r}: {error}") from None
        matrices = [place for place, names in self.groups.items()
                    if mixes.is_quantized(place, dimensions(self.checkpoint, names))]
        if not any(compiled.search(place) for place in matrices):
            raise StageError(Failure.CONFIG_INVALID, f"expected the override {pattern!r} to fit a matrix of the GGUF "
                                                     f"file, such as {matrices[0]}; it fits none")
        return compiled

    def pinned(self, place: str) -> bool:
        """Whether the overrides name a tensor of the file."""
        return any(pattern.search(place) for pattern, _ in self.patterns)

    def types(self, name: str) -> tuple[str, str]:
        """(the type asked for, the type that the tensor's rows allow)."""
        place, width = self.places[name], self.checkpoint.shape(name)[-1]
        many = dimensions(self.checkpoint, self.groups[place])
        kind = mixes.requested_type(self.recipe.mix, place, many, self.model)
        if not mixes.is_quantized(place, many):
            return kind, kind
        for pattern, override in self.patterns:
            if pattern.search(place):
                return override, mixes.fit_width(override, width)
        return kind, mixes.actual_type(self.recipe.mix, place, kind, width, self.model)

    def importance(self, name: str, kind: str) -> tuple[np.ndarray | None, int]:
        """(the weights of a tensor's inputs float32 [in], the tokens that they come from); None where there are none.

        The embedding and the head have none, as in llama.cpp's tool. Raises StageError: importance_missing if a matrix
        of a block has none though the recipe asks for them, or if the type is garbage without; importance_invalid.
        """
        place, width = self.places[name], self.checkpoint.shape(name)[-1]
        if kind in mixes.FLOATS:
            return None, 0
        entry = self.matrix.entries.get(place) if self.matrix else None
        if entry is None:
            if mixes.needs_importance(self.recipe.mix, place, kind):
                raise StageError(Failure.IMPORTANCE_MISSING, f"expected an importance matrix for {place}, since {kind} "
                                 "is garbage without one, found none; set importance: true, or name an importance_file")
            if self.matrix and self.facts.layer_index(name) is not None:
                raise StageError(Failure.IMPORTANCE_MISSING, f"expected an entry for {place} in {self.source}, found "
                                 "none; make the importance matrix again for this model, or set importance: false")
            return None, 0
        group = self.groups[place]
        if entry.sums.shape != (len(group), width):
            raise StageError(Failure.IMPORTANCE_INVALID, f"expected an entry of {len(group)} times {width} numbers for "
                             f"{place} in {self.source}, found {entry.sums.shape}; it belongs to another model")
        number = group.index(name)
        return entry.values()[number], int(entry.counts[number])

    @property
    def source(self) -> str:
        """Where the importance matrix comes from."""
        return self.recipe.importance_file or str(self.moments.folder)

    @cached_property
    def matrix(self) -> imatrix.ImportanceMatrix | None:
        """The recipe's importance matrix: a file of llama.cpp's tool, or the diagonal of the calibration's moments."""
        if self.recipe.importance_file:
            return imatrix.read(Path(self.recipe.importance_file))
        if not self.recipe.importance:
            return None
        entries = {}
        for place, names in self.groups.items():
            modules = [self.layer(name) for name in names]
            if all(module in self.moments.layers for module in modules):
                counts = np.float32([self._tokens(module) for module in modules])
                means = np.stack([self.moments.diagonal(module) for module in modules])
                entries[place] = imatrix.Entry(means * counts[:, None], counts)
        info = self.moments.info
        return imatrix.ImportanceMatrix(entries, (str(info.get("text")),), info.get("sequences", 1),
                                        info.get("length", info["tokens"]))

    def layer(self, name: str) -> str | None:
        """The layer of the calibration whose weight a tensor is; None where that is not known of a converter's file."""
        return self.checkpoint.layer(name) if isinstance(self.checkpoint, Converted) else name.removesuffix(".weight")

    def _tokens(self, module: str) -> int:
        """How many tokens a layer's moments come from: of an expert to which too few came, all."""
        seen = self.moments.seen(module)
        return self.moments.info["tokens"] if seen.get("starved") else seen["tokens"]

    def about_importance(self) -> dict | None:
        """What a file says of the importance matrix, if there is one."""
        return self.matrix and {"file": self.recipe.importance_file or imatrix.FILE, "chunks": self.matrix.chunks,
                                "dataset": ", ".join(self.matrix.datasets), "entries": len(self.matrix.entries)}

    def write_importance(self, folder: Path) -> dict | None:
        """Put the importance matrix into the folder as llama-imatrix would; returns what the report says of it."""
        if self.matrix is None:
            return None
        imatrix.write(folder / imatrix.FILE, self.matrix, container_of(self.facts).name)
        return self.about_importance() | {"sha256": sha256_file(folder / imatrix.FILE)}
