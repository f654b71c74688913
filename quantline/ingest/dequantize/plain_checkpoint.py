"""Writing the plain checkpoint that a quantized one stands for, one tensor in memory at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from quantline.errors import Failure, StageError
from quantline.files import write_json
from quantline.ingest.dequantize.stored import PLAIN
from quantline.model.checkpoint_files import INDEX, SINGLE
from quantline.model.dtypes import STORED_NAMES
from quantline.model.safetensors_writer import ENTRY_BYTES, SafetensorsWriter

SHARD_BYTES = 4 << 30
KEYS = ("quantization_config", "compression_config")
DTYPE_KEYS = ("dtype", "torch_dtype")


def without_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without its quantization, at any depth."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        if key not in KEYS:
            plain[key] = without_settings(value) if isinstance(value, dict) else value
    return plain


def target_dtype(config: Mapping[str, Any]) -> str:
    """Return the float type that config.json names for the weights; bfloat16 if it names none."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        for key in DTYPE_KEYS:
            if section.get(key) in STORED_NAMES:
                return str(section[key])
    return "bfloat16"


def rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values once to a float type of config.json.

    Raises:
        StageError: non_finite.
    """
    with np.errstate(over="ignore"):
        result = values.astype(PLAIN[STORED_NAMES[dtype]])
    if not np.isfinite(result).all():
        found = "NaN or infinity after dequantizing it; the quantization broke, take another file"
        if np.isfinite(values).all():
            largest = float(np.abs(values).max())
            found = (
                f"values up to {largest:.3g}, which it does not hold; set the dtype in config.json "
                "to one that does (bfloat16, float32) if the scales are right"
            )
        raise StageError(
            Failure.NON_FINITE, f"expected {name} to be finite in {dtype}, found {found}"
        )
    return result


class PlainWriter:
    """A context manager that writes tensors into shards, each as soon as it is there.

    Files have their names, and the index is there, when the block has ended well.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        """Write into a folder.

        Args:
            folder: An empty folder.
            names: The tensors that will be added, or as many of about such names; where more
                come, they get a further shard.
        """
        self.folder = folder
        self.names = names
        self.shards: list[list[str]] = []
        self.bytes = 0
        self._entries = 0  # bytes of the shard's header, at most
        self._writer: SafetensorsWriter | None = None

    def __enter__(self) -> Self:
        return self

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Append a tensor."""
        entry = len(json.dumps(name)) + ENTRY_BYTES
        if self._writer is None or self._is_full(self._writer, entry):
            self._close()
            self._entries = ENTRY_BYTES
            path = self.folder / f"shard-{len(self.shards)}"
            self._writer = SafetensorsWriter(path, self.names).__enter__()
            self.shards.append([])
        self._writer.add(name, tensor)
        self._entries += entry
        self.shards[-1].append(name)
        self.bytes += tensor.nbytes

    def _is_full(self, writer: SafetensorsWriter, entry: int) -> bool:
        """Whether a tensor whose entry takes so many bytes has to go into another shard."""
        return writer.end > SHARD_BYTES or self._entries + entry > writer.room

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None

    def __exit__(self, kind: type[BaseException] | None, *problem: object) -> None:
        if kind is not None:
            if self._writer is not None:
                self._writer.__exit__(kind, *problem)
            return
        self._close()
        count = len(self.shards)
        if count == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            final = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)
