"""The types and the importance matrix that a recipe in ggml's blocks means for one model."""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import Recipe
from quantline.errors import Failure, StageError
from quantline.files import sha256_file
from quantline.formats.gguf import imatrix
from quantline.formats.gguf.architectures import (
    dimensions,
    gguf_family,
    gguf_names,
    group_by_gguf_name,
)
from quantline.methods.ggml import mixes
from quantline.methods.ggml.mix_rules import ModelTraits
from quantline.model.architecture import Architecture
from quantline.model.tensor_source import TensorSource

LAYERS_OF_70B = 80


class MixRecipe(Protocol):
    """What every recipe in ggml's blocks has (see GgmlRecipe)."""

    @property
    def mix(self) -> str:
        """llama.cpp's name for the choice of types."""

    @property
    def overrides(self) -> Mapping[str, str]:
        """Regular expression for names in the GGUF file → type, of which the first applies."""

    @property
    def uses_importance(self) -> bool:
        """Whether errors are weighted by an importance matrix."""

    @property
    def importance_path(self) -> str | None:
        """The file of the importance matrix; None where the calibration provides it."""


def is_70b(arch: Architecture) -> bool:
    """Whether llama.cpp's mixes take a model for "70B".

    Raises:
        StageError: unsupported_architecture, as gguf_family does.
    """
    rule = gguf_family(arch).counts_as_70b
    if arch.layers != LAYERS_OF_70B:
        return False
    if rule == "with shared keys":
        return arch.heads != arch.kv_heads
    return rule == "always"


def compile_override(
    pattern: str, source: TensorSource, groups: Mapping[str, list[str]]
) -> re.Pattern[str]:
    """Compile an override's pattern, which has to match a matrix of the file.

    Args:
        pattern: Regular expression for names in the GGUF file.
        source: The model.
        groups: Name in the file → the source's tensors that it consists of.

    Raises:
        StageError: config_invalid.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected a regular expression among the overrides, found {pattern!r}: {error}; "
            "correct it",
        ) from None
    matrices = [
        gguf_name
        for gguf_name, names in groups.items()
        if mixes.is_quantized(gguf_name, dimensions(source, names))
    ]
    if not any(compiled.search(gguf_name) for gguf_name in matrices):
        raise StageError(
            Failure.CONFIG_INVALID,
            f"expected the override {pattern!r} to match a matrix of the GGUF file, such as "
            f"{matrices[0]}, found that it matches none; correct it",
        )
    return compiled


def check_overrides(recipe: Recipe, source: TensorSource) -> None:
    """Check that each override of a recipe matches a tensor.

    Raises:
        StageError: config_invalid; unsupported_architecture, as `gguf_names` does.
    """
    groups = group_by_gguf_name(gguf_names(source))
    for pattern in cast(MixRecipe, recipe).overrides:
        compile_override(pattern, source, groups)


class TensorTypes:
    """A recipe in ggml's blocks, tensor by tensor.

    Tensors go by the source's names; llama.cpp's rules and the overrides look at the names in the
    GGUF file.

    Attributes:
        gguf_names: Source tensor → its name in the file.
        groups: Name in the file → the source's tensors that it consists of.
        traits: What llama.cpp's rules know of the model.

    Raises:
        StageError: unsupported_architecture; config_invalid, for an override that matches no tensor
            or is no regular expression.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: TensorSource,
        arch: Architecture,
        calibration: CalibrationStore,
    ) -> None:
        """Read the names of the tensors, and check the recipe's overrides."""
        self.recipe = cast(MixRecipe, recipe)
        self.source = source
        self.arch = arch
        self.calibration = calibration
        self.gguf_names = gguf_names(source)
        self.groups = group_by_gguf_name(self.gguf_names)
        self.traits = ModelTraits(
            layers=arch.layers,
            tied=arch.tied,
            heads_per_kv=arch.heads // arch.kv_heads if arch.kv_heads else 0,
            experts=arch.experts,
            is_70b=is_70b(arch),
            has_importance=self.recipe.uses_importance,
            architecture=gguf_family(arch).name,
        )
        self.places = mixes.places_of(self.recipe.mix, self.groups, self.traits)
        self.overrides = [
            (compile_override(pattern, source, self.groups), ggml_type)
            for pattern, ggml_type in self.recipe.overrides.items()
        ]

    def is_overridden(self, gguf_name: str) -> bool:
        """Whether an override names a tensor of the file."""
        return any(pattern.search(gguf_name) for pattern, _ in self.overrides)

    def is_quantized(self, gguf_name: str) -> bool:
        """Whether mixes quantize a tensor of the file."""
        return mixes.is_quantized(gguf_name, self._dimensions(gguf_name))

    def _dimensions(self, gguf_name: str) -> int:
        return dimensions(self.source, self.groups[gguf_name])

    def types(self, name: str) -> tuple[str, str]:
        """Return the type that is asked for, and the one that the tensor's rows allow."""
        gguf_name = self.gguf_names[name]
        width = self.source.shape(name)[-1]
        mix = self.recipe.mix
        dimensions = self._dimensions(gguf_name)
        place = self.places.get(gguf_name)
        requested = mixes.requested_type(mix, gguf_name, dimensions, self.traits, place)
        if not self.is_quantized(gguf_name):
            return requested, requested
        for pattern, override in self.overrides:
            if pattern.search(gguf_name):
                return override, mixes.fit_width(override, width)
        return requested, mixes.actual_type(mix, gguf_name, requested, width, self.traits)

    def importance(self, name: str, ggml_type: str) -> tuple[np.ndarray | None, int]:
        """Return how much a tensor's inputs matter.

        Args:
            name: Of a source tensor.
            ggml_type: The type that it is to have.

        Returns:
            The weight of each input float32 [in], and the tokens that it comes from. None and 0 for
            floats, and as in llama.cpp's tool for the embedding and the head.

        Raises:
            StageError: importance_missing, if a matrix of a block has none though the recipe asks
                for it, or if the type is garbage without; importance_invalid, if it does not fit
                the model; and as `read_importance` does.
        """
        if ggml_type in mixes.FLOAT_TYPES:
            return None, 0
        gguf_name = self.gguf_names[name]
        entry = self.matrix.entries.get(gguf_name) if self.matrix else None
        if entry is None:
            self._check_not_needed(name, ggml_type)
            return None, 0
        group = self.groups[gguf_name]
        width = self.source.shape(name)[-1]
        if entry.sums.shape != (len(group), width):
            raise StageError(
                Failure.IMPORTANCE_INVALID,
                f"expected an entry of {len(group)} times {width} numbers for {gguf_name} in "
                f"{self._origin}, found {entry.sums.shape}; it belongs to another model",
            )
        number = group.index(name)
        return entry.values()[number], int(entry.counts[number])

    def _check_not_needed(self, name: str, ggml_type: str) -> None:
        """Check that a tensor may be without importance. Raises StageError: importance_missing."""
        gguf_name = self.gguf_names[name]
        if mixes.needs_importance(self.recipe.mix, gguf_name, ggml_type):
            raise StageError(
                Failure.IMPORTANCE_MISSING,
                f"expected an importance matrix for {gguf_name}, since {ggml_type} is garbage "
                "without one, found none; set importance: true, or name an importance_file",
            )
        if self.matrix and self.is_expected(name):
            raise StageError(
                Failure.IMPORTANCE_MISSING,
                f"expected an entry for {gguf_name} in {self._origin}, found none; make the "
                "importance matrix again for this model, or set importance: false",
            )

    def is_expected(self, name: str) -> bool:
        """Whether an importance matrix has to have an entry for a tensor.

        Of a converter's tensors calibration knows those alone whose rows are the checkpoint's, and
        whose layer is not kept as it is.
        """
        if self.arch.layer_index(name) is None:
            return False
        layer = self.source.layer_of(name) if self.source.converted else name
        known = not self.source.converted or layer in self.calibration.info["layers"]
        return known or self.recipe.importance_path is not None

    @property
    def _origin(self) -> str:
        """Where the importance matrix comes from, for messages."""
        return self.recipe.importance_path or str(self.calibration.folder)

    @cached_property
    def matrix(self) -> imatrix.ImportanceMatrix | None:
        """The recipe's importance matrix, if it wants one.

        It is a file of llama.cpp's tool, or the diagonal of the calibration's Hessians.
        """
        if self.recipe.importance_path:
            return imatrix.read_importance(Path(self.recipe.importance_path))
        if not self.recipe.uses_importance:
            return None
        calibrated = set(self.calibration.layers)
        entries = {}
        for gguf_name, names in self.groups.items():
            layers = []
            for name in names:
                layer = self.source.layer_of(name)
                if layer is not None and layer in calibrated:
                    layers.append(layer)
            if len(layers) < len(names):
                continue
            counts = np.array([self._tokens(layer) for layer in layers], np.float32)
            means = np.stack(
                [
                    self.source.in_order_of(name, self.calibration.hessian_diagonal(layer))
                    for name, layer in zip(names, layers, strict=True)
                ]
            )
            entries[gguf_name] = imatrix.Entry(means * counts[:, None], counts)
        info = self.calibration.info
        return imatrix.ImportanceMatrix(
            entries,
            datasets=(str(info.get("text")),),
            chunks=info.get("sequences", 1),
            chunk_size=info.get("length", info["tokens"]),
        )

    def _tokens(self, layer: str) -> int:
        """Return how many tokens a layer's Hessian comes from.

        All, for an expert that too few tokens reached.
        """
        coverage = self.calibration.coverage(layer)
        if coverage.get("starved"):
            return self.calibration.info["tokens"]
        return coverage["tokens"]

    def importance_summary(self) -> dict[str, Any] | None:
        """Return what a GGUF file says of the importance matrix, if there is one."""
        if self.matrix is None:
            return None
        return {
            "file": self.recipe.importance_path or imatrix.FILE,
            "chunks": self.matrix.chunks,
            "dataset": ", ".join(self.matrix.datasets),
            "entries": len(self.matrix.entries),
        }

    def write_importance(self, folder: Path) -> dict[str, Any] | None:
        """Write the importance matrix as llama-imatrix would.

        Returns:
            What the report says of it; None where there is none.
        """
        summary = self.importance_summary()
        if self.matrix is None or summary is None:
            return None
        path = folder / imatrix.FILE
        imatrix.write_importance(path, self.matrix, gguf_family(self.arch).name)
        return summary | {"sha256": sha256_file(path)}
