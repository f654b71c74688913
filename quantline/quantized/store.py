"""The one canonical layout of quantized weights: what every method writes and every container reads.

A grouped linear layer is integers, scales and zero points, and stands for (integers - zeros) * scales; one in eight-bit
floats is values times scales. The k-quants are ggml blocks, row by row as in the source. Tensors that a method changes without quantizing them (norms into which
AWQ folded its scales) are overrides. They lie in one safetensors file per part of the model; quantized.json is the report.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from quantline.errors import Failure, StageError
from quantline.files import write_json

REPORT = "quantized.json"


@dataclass(frozen=True)
class GroupedLinear:
    """integers uint8 [out, in] in 0 … 2^bits - 1; scales float32 [out, groups]; zeros uint8 [out, groups].

    A group is `group_size` neighbouring inputs of one output; the scales are values that bfloat16 holds exactly.
    """

    integers: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        rows, columns = self.integers.shape
        groups = (rows, columns // self.group_size)
        if columns % self.group_size or self.scales.shape != groups or self.zeros.shape != groups:
            raise ValueError(f"expected scales and zeros {groups}, found {self.scales.shape}, {self.zeros.shape}")
        if not np.isfinite(self.scales).all():
            raise StageError(Failure.NON_FINITE, "a scale is not finite; look at the weights of this layer")
        if self.integers.max(initial=0) >= 1 << self.bits or self.zeros.max(initial=0) >= 1 << self.bits:
            raise ValueError(f"an integer or zero point does not fit {self.bits} bits")

    @property
    def kind(self) -> str:
        """What one weight is stored as."""
        return f"int{self.bits}"

    @property
    def scheme(self) -> tuple[str, bool, int, bool]:
        """(kind, symmetric, group size, whether a group is the whole row): what layers of one layout have to share."""
        return self.kind, self.symmetric, self.group_size, self.group_size == self.integers.shape[1]

    def about(self) -> dict:
        """What quantized.json says of it."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    def parts(self) -> dict[str, np.ndarray]:
        return {"integers": self.integers, "scales": self.scales, "zeros": self.zeros}

    def dequantize(self) -> np.ndarray:
        """The weight that the integers stand for, float32 [out, in]."""
        rows, columns = self.integers.shape
        grouped = self.integers.reshape(rows, -1, self.group_size).astype(np.float32)
        return ((grouped - self.zeros[:, :, None]) * self.scales[:, :, None]).reshape(rows, columns)


@dataclass(frozen=True)
class FloatLinear:
    """values float8_e4m3fn [out, in]; scales float32 [out, 1], values that bfloat16 holds exactly."""

    values: np.ndarray
    scales: np.ndarray
    kind = "float8"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scales).all() and np.isfinite(self.values.astype(np.float32)).all()):
            raise StageError(Failure.NON_FINITE, "a value is not finite; look at the weights of this layer")

    @property
    def scheme(self) -> tuple[str, bool, int, bool]:
        """As that of GroupedLinear."""
        return self.kind, True, self.values.shape[1], True

    def about(self) -> dict:
        """What quantized.json says of it."""
        return {"kind": self.kind}

    def parts(self) -> dict[str, np.ndarray]:
        return {"values": self.values.view(np.uint8), "scales": self.scales}

    def dequantize(self) -> np.ndarray:
        """The weight that it stands for, float32 [out, in]."""
        return self.values.astype(np.float32) * self.scales


class QuantizedWriter:
    """Collects what a method makes of one part of the model (a decoder block, or what lies outside of them) and writes it,
    so that one part is in memory at a time. A part that is in the folder already need not be made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._clear()

    def _clear(self) -> None:
        self.tensors, self.kinds = {}, {"linears": {}, "overrides": {}, "blocks": {}}

    def add_linear(self, name: str, linear: GroupedLinear | FloatLinear) -> None:
        """A quantized linear layer, by its module name."""
        self.tensors |= {f"{name}.{part}": values for part, values in linear.parts().items()}
        self.kinds["linears"][name] = linear.about()

    def add_override(self, name: str, tensor: np.ndarray) -> None:
        """A full-precision tensor, float32, that takes the place of the source's."""
        self.tensors[f"override:{name}"] = np.ascontiguousarray(tensor, np.float32)
        self.kinds["overrides"][name] = {}

    def add_blocks(self, name: str, kind: str, data: np.ndarray, shape: tuple[int, ...]) -> None:
        """ggml blocks uint8 [rows, bytes per row] of type `kind`, standing for a tensor of `shape`."""
        self.tensors[f"blocks:{name}"] = data
        self.kinds["blocks"][name] = {"type": kind, "shape": list(shape)}

    def report_of(self, part: str) -> dict | None:
        """The report of a part that is complete, else None."""
        path = self.folder / f"{part}.json"
        return json.loads(path.read_text(encoding="utf-8"))["report"] if path.is_file() else None

    def close_part(self, part: str, report: dict) -> None:
        """Write what was added since the last part. The part counts as complete once its report is there."""
        save_file(dict(sorted(self.tensors.items())), self.folder / f"{part}.safetensors")
        contents = {kind: {name: about | {"part": part} for name, about in found.items()}
                    for kind, found in self.kinds.items()}
        write_json(self.folder / f"{part}.json", {"contents": contents, "report": report})
        self._clear()

    def close(self, report: dict) -> None:
        """Write the report on the whole, after the last part."""
        if self.tensors:
            self.close_part("rest", {})
        contents = {"linears": {}, "overrides": {}, "blocks": {}}
        parts = sorted(path for path in self.folder.glob("*.json") if path.with_suffix(".safetensors").is_file())
        for path in parts:
            for kind, found in json.loads(path.read_text(encoding="utf-8"))["contents"].items():
                contents[kind] |= found
        write_json(self.folder / REPORT, report | {"contents": contents})
        for path in parts:
            path.unlink()


class Quantized:
    """A quantized model in the canonical layout, read tensor by tensor."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.report = json.loads((self.folder / REPORT).read_text(encoding="utf-8"))
        self._contents = self.report["contents"]
        self.linears, self.overrides, self.blocks_names = (sorted(self._contents[kind])
                                                           for kind in ("linears", "overrides", "blocks"))

    def _get(self, about: dict, key: str) -> np.ndarray:
        with safe_open(self.folder / f"{about['part']}.safetensors", "np") as file:
            return file.get_tensor(key)

    def linear(self, name: str) -> GroupedLinear | FloatLinear:
        about = self._contents["linears"][name]
        if about.get("kind") == FloatLinear.kind:
            return FloatLinear(self._get(about, f"{name}.values").view(ml_dtypes.float8_e4m3fn), self._get(about, f"{name}.scales"))
        parts = (self._get(about, f"{name}.{part}") for part in ("integers", "scales", "zeros"))
        return GroupedLinear(*parts, about["bits"], about["group_size"], about["symmetric"])

    def override(self, name: str) -> np.ndarray:
        return self._get(self._contents["overrides"][name], f"override:{name}")

    def blocks(self, name: str) -> tuple[str, np.ndarray, tuple[int, ...]]:
        """(type, uint8 [rows, bytes per row], shape of the tensor)."""
        about = self._contents["blocks"][name]
        return about["type"], self._get(about, f"blocks:{name}"), tuple(about["shape"])
