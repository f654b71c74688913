"""What a format of quantized checkpoints has to know about itself, and the registry of all.

The life of a Dequantizer: it is made of `quantization_config`, and refuses what it does not know
before any weights are fetched. Then `plan` says for every plain tensor which stored tensors it is
made of, from names, dtypes and shapes alone. `restore` gets the stored parts of one plain tensor at
a time and returns what they stand for, in float32; it is rounded once, by whoever writes it.

What a source means is read off its tensors as far as they say it; the options are held against
that. No model's name or type decides anything here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from quantline.errors import Failure, StageError
from quantline.ingest.dequantize.stored import StoredTensors
from quantline.quantized.tensors import GroupedLinear
from quantline.registry import Registry

DEQUANTIZERS: Registry[type["Dequantizer"]] = Registry("quantization method")
Found = TypeVar("Found", bound="type[Dequantizer]")


def register_dequantizer(*methods: str) -> Callable[[Found], Found]:
    """Register a Dequantizer under the names that `quant_method` can have."""

    def add(found: Found) -> Found:
        for method in methods:
            DEQUANTIZERS.add(method, found)
        return found

    return add


class Plan(NamedTuple):
    """What becomes of every stored tensor.

    Attributes:
        restored: Plain tensor → part → the stored tensor that is this part.
        dropped: Stored tensors that a plain model has no use for, such as scales of activations.
        kept: Those that are plain already.
    """

    restored: dict[str, dict[str, str]]
    dropped: list[str]
    kept: list[str]


class Parts(Mapping[str, np.ndarray]):
    """The stored parts of one plain tensor, each read when it is asked for."""

    def __init__(
        self,
        name: str,
        stored: StoredTensors,
        names: Mapping[str, str],
        expert: int | None = None,
        experts: int = 0,
    ) -> None:
        """Read nothing yet.

        Args:
            name: The plain tensor.
            stored: The checkpoint.
            names: Part → stored tensor.
            expert: Of parts that hold one entry for each expert, the one that is wanted.
            experts: How many there are.
        """
        self.name = name
        self.stored = stored
        self.names = names
        self.expert = expert
        self.experts = experts

    def of_expert(self, number: int, count: int) -> "Parts":
        """Return the same parts, of one expert of so many."""
        return Parts(self.name, self.stored, self.names, number, count)

    def __getitem__(self, part: str) -> np.ndarray:
        """Return a part as it is stored. Raises StageError(missing_shard) if it is not there."""
        if part not in self.names:
            raise self.missing(part)
        values = self.stored.read(self.names[part])
        if self.expert is None or values.size == 1:
            return values
        if len(values) != self.experts:
            raise self.misfit(part, f"one entry for each of {self.experts} experts")
        return values[self.expert]

    def __contains__(self, part: object) -> bool:
        return part in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, part: str) -> str:
        """Return a part's dtype as safetensors names it; "" if there is no such part."""
        return self.stored.dtype(self.names[part]) if part in self.names else ""

    def octets(self, part: str) -> np.ndarray:
        """Return the bytes of a part."""
        return self.stored.octets(self.names[part])

    def finite(self, part: str) -> np.ndarray:
        """Return a part in float32.

        Raises:
            StageError: missing_shard; unsupported_architecture, for whole numbers; non_finite, for
                NaN or infinity in it.
        """
        stored = self[part]
        if stored.dtype.kind in "iub":
            raise self.misfit(part, "floating-point numbers")
        values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise self.not_finite(part)
        return values

    def whole_numbers(self, part: str) -> np.ndarray:
        """Return a part in int64. Raises StageError: missing_shard, unsupported_architecture."""
        stored = self[part]
        if stored.dtype.kind not in "iu":
            raise self.misfit(part, "whole numbers")
        return stored.astype(np.int64)

    def missing(self, part: str) -> StageError:
        """Return the error for a part that is not there."""
        return StageError(
            Failure.MISSING_SHARD,
            f"expected the {part} of {self.name} in {self.stored.folder}, found only "
            f"{', '.join(sorted(self.names.values()))}; fetch the whole checkpoint again",
        )

    def not_finite(self, part: str) -> StageError:
        """Return the error for a part with NaN or infinity in it."""
        return StageError(
            Failure.NON_FINITE,
            f"expected finite numbers in {self.names[part]} in {self.stored.folder}, found NaN or "
            "infinity; the quantization broke, take another file",
        )

    def misfit(self, part: str, expected: object) -> StageError:
        """Return the error for a part of another form than the others ask for."""
        name = self.names[part]
        return StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {name} to be {expected}, found {self.dtype(part)} "
            f"{self.stored.shape(name)} in {self.stored.folder}; fetch the checkpoint again, or "
            "start from its full-precision source",
        )


class Dequantizer:
    """A format of quantized checkpoints.

    Attributes:
        NEUTRAL: Options that say how it was made or how it is served, and not what it means.
        FIXED: Option → the values that are known.
        SIGNS: How names of tensors end that no plain model has.
    """

    NEUTRAL: frozenset[str] = frozenset()
    FIXED: Mapping[str, tuple[Any, ...]] = {}
    SIGNS: tuple[str, ...] = ()

    def __init__(self, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Check the options.

        Args:
            settings: `quantization_config`.
            config: The content of config.json around it.

        Raises:
            StageError: unsupported_architecture.
        """
        self.settings = settings
        self.config = config
        self.method = str(settings.get("quant_method"))
        for option, value in settings.items():
            self._check_option(option, value)

    def _check_option(self, option: str, value: Any) -> None:
        """Refuse an option, or a value of one, that may mean something that is not known here."""
        if option in self.FIXED:
            if value not in self.FIXED[option]:
                known = ", ".join(repr(known) for known in self.FIXED[option])
                raise self.refusal(f"{option} among {known}", f"{value!r:.80}")
        elif option not in self.NEUTRAL | {"quant_method"} and value not in (None, False, [], {}):
            raise self.refusal("only options whose meaning is known", f"{option} = {value!r:.80}")

    def refusal(self, expected: str, found: str) -> StageError:
        """Return the error for options or tensors that this format cannot be read with."""
        return StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {expected} in a checkpoint quantized by {self.method}, found {found}; start "
            "from its full-precision source, or from another quantization of it",
        )

    def plan(self, stored: StoredTensors) -> Plan:
        """Say what becomes of every tensor."""
        raise NotImplementedError

    def restore(self, parts: Parts) -> np.ndarray:
        """Return what the parts of a plain tensor stand for, in float32.

        Raises:
            StageError: missing_shard, unsupported_architecture, non_finite.
        """
        raise NotImplementedError

    def grouped(self, parts: Parts) -> GroupedLinear | None:
        """Return a layer's integers as recipes hold theirs; None if they are of another kind."""
        return None

    def experts(self, parts: Parts) -> int | None:
        """Return how many experts a plain tensor holds that is restored one expert at a time."""
        return None
