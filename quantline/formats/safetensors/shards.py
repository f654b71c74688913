"""Writing a model's tensors into one safetensors file, or into several with an index."""

from pathlib import Path

import numpy as np

from quantline.files import write_json, write_tensors
from quantline.model.checkpoint_files import INDEX, SINGLE

SHARD_BYTES = 2 << 30  # a shard is in memory until it is written


class ShardWriter:
    """Writes tensors in the order given, a new file every SHARD_BYTES.

    The files have their names once `close` was called.
    """

    def __init__(self, folder: Path) -> None:
        """Write into a folder."""
        self.folder = folder
        self._tensors: dict[str, np.ndarray] = {}
        self._bytes = 0
        self._total_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """Add the tensors of one layer, which stay in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._tensors and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._tensors |= tensors
        self._bytes += size
        self._total_bytes += size

    def _flush(self) -> None:
        """Write the tensors that are in memory to a file of their own."""
        path = self.folder / f"shard-{len(self._shards)}"
        write_tensors(path, self._tensors, {"format": "pt"})
        self._shards.append((path, sorted(self._tensors)))
        self._tensors = {}
        self._bytes = 0

    def close(self) -> None:
        """Write what is left, and give the files their names."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)
