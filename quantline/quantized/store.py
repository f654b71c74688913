"""The canonical store: what every method writes and every container reads.

Quantized tensors, and tensors that a method changes without quantizing them (norms into which
scales were folded), lie in one safetensors file per part of the model. quantized.json is the
report.
"""

import os
from collections.abc import Collection, Mapping
from copy import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from quantline.config.recipes import Recipe
from quantline.durable import sync, temporary_path
from quantline.errors import Failure, Reason, StageError
from quantline.files import check_made, read_json, write_json, write_tensors
from quantline.freed_memory import return_freed_memory
from quantline.quantized.storages import GROUPED, STORAGES
from quantline.quantized.tensors import GgmlBlocks, GroupedLinear, QuantizedTensor, Scheme
from quantline.registry import load_object

REPORT = "quantized.json"
REST = "rest"  # the part that holds what lies outside the decoder blocks


def block_part(block: int) -> str:
    """Return the part that holds a decoder block."""
    return f"block-{block:03d}"


def _no_contents() -> dict[str, dict[str, Any]]:
    return {"linears": {}, "outside": {}, "overrides": {}, "blocks": {}}


class QuantizedWriter:
    """Collects one part of the model at a time, a decoder block for example, and writes it.

    A part that is in the folder already need not be made again.
    """

    def __init__(self, folder: Path) -> None:
        """Write into a folder."""
        self.folder = folder
        self.tensors: dict[str, np.ndarray] = {}
        self.contents = _no_contents()

    def add_linear(self, name: str, linear: QuantizedTensor) -> None:
        """Add a quantized linear layer, by its module name."""
        self._add(name, linear, "linears")

    def add_outside(self, name: str, linear: QuantizedTensor) -> None:
        """Add a quantized embedding or output head, by its module name."""
        self._add(name, linear, "outside")

    def _add(self, name: str, linear: QuantizedTensor, contents: str) -> None:
        for part, values in linear.parts().items():
            self.tensors[f"{name}.{part}"] = values
        entry = linear.describe()
        if linear.storage != GROUPED:
            entry = {"kind": linear.storage} | entry
        self.contents[contents][name] = entry

    def add_override(self, name: str, tensor: np.ndarray) -> None:
        """Add a full-precision tensor that replaces the source's."""
        self.tensors[f"override:{name}"] = np.ascontiguousarray(tensor, np.float32)
        self.contents["overrides"][name] = {}

    def add_ggml_blocks(self, name: str, blocks: GgmlBlocks) -> None:
        """Add a tensor in ggml's blocks."""
        self.tensors[f"blocks:{name}"] = blocks.data
        self.contents["blocks"][name] = {"type": blocks.type, "shape": list(blocks.shape)}

    def report_of(self, part: str) -> dict[str, Any] | None:
        """Return the report of a part that is complete; None for one that is not."""
        path = self.folder / f"{part}.json"
        return read_json(path)["report"] if path.is_file() else None

    def close_part(self, part: str, report: dict[str, Any]) -> None:
        """Write what was added since the last part; it is complete once its report is there."""
        write_tensors(self.folder / f"{part}.safetensors", dict(sorted(self.tensors.items())))
        for entries in self.contents.values():
            for entry in entries.values():
                entry["part"] = part
        write_json(self.folder / f"{part}.json", {"contents": self.contents, "report": report})
        self.tensors = {}
        self.contents = _no_contents()
        return_freed_memory()

    def change_part(
        self,
        part: str,
        tensors: Mapping[str, np.ndarray],
        overrides: Mapping[str, np.ndarray],
    ) -> None:
        """Replace tensors of a part that is complete; a kill leaves the old file or the new one.

        Args:
            part: Its name; one that is not there is made, of the overrides alone.
            tensors: `<layer>.<name>` → the array in the place of the one that is there.
            overrides: As for `add_override`, whether they are there already or not.
        """
        path = self.folder / f"{part}.safetensors"
        known: dict[str, Any] = {"contents": _no_contents(), "report": {"layers": {}}}
        if path.is_file():
            known = read_json(path.with_suffix(".json"))
        values = load_file(path) if path.is_file() else {}
        values |= tensors
        for name, tensor in overrides.items():
            values[f"override:{name}"] = np.ascontiguousarray(tensor, np.float32)
            known["contents"]["overrides"][name] = {"part": part}
        temporary = temporary_path(path)
        write_tensors(temporary, dict(sorted(values.items())))
        os.replace(temporary, path)
        sync(self.folder)
        write_json(path.with_suffix(".json"), known)
        return_freed_memory()

    def so_far(self) -> "QuantizedModel":
        """Return the parts that are complete, before there is a report on the whole."""
        return QuantizedModel(self.folder, {"contents": self._contents_of_parts()})

    def close(self, report: dict[str, Any]) -> None:
        """Write the report on the whole, after the last part."""
        if self.tensors:
            self.close_part(REST, {})
        write_json(self.folder / REPORT, report | {"contents": self._contents_of_parts()})
        self._remove_part_reports()

    def _contents_of_parts(self) -> dict[str, dict[str, Any]]:
        contents = _no_contents()
        for path in self._part_reports():
            for kind, entries in read_json(path)["contents"].items():
                contents[kind] |= entries
        return contents

    def finished_report(self) -> dict[str, Any] | None:
        """Return the report on the whole, if an earlier run was killed after it was written."""
        path = self.folder / REPORT
        if not path.is_file():
            return None
        self._remove_part_reports()
        report = read_json(path)
        del report["contents"]
        return report

    def _remove_part_reports(self) -> None:
        for path in self._part_reports():
            path.unlink()

    def _part_reports(self) -> list[Path]:
        paths = self.folder.glob("*.json")
        return sorted(path for path in paths if path.with_suffix(".safetensors").is_file())


class QuantizedModel:
    """A quantized model in the canonical store, read tensor by tensor.

    Attributes:
        report: The content of quantized.json.
        linears: Names of the quantized linear layers, sorted.
        outside: Names of the quantized embedding and output head, which not every container holds
            rounded; see `with_outside`.
        overrides: Names of the tensors that replace the source's, sorted.
        ggml_names: Names of the tensors that are stored in ggml's blocks, sorted.
    """

    def __init__(self, folder: Path | str, report: dict[str, Any] | None = None) -> None:
        """Read quantized.json, unless its content is given."""
        self.folder = Path(folder)
        self.report = read_json(self.folder / REPORT) if report is None else report
        self._contents = self.report["contents"]
        self._linears = dict(self._contents["linears"])
        self.linears = sorted(self._linears)
        self.outside = sorted(self._contents.get("outside", {}))
        self.overrides = sorted(self._contents["overrides"])
        self.ggml_names = sorted(self._contents["blocks"])

    def _read(self, entry: dict[str, Any], key: str) -> np.ndarray:
        with safe_open(self.folder / f"{entry['part']}.safetensors", "np") as file:
            return file.get_tensor(key)

    def with_outside(self, names: Collection[str] | None = None) -> "QuantizedModel":
        """Return the same store for a container that holds embedding and head rounded.

        They are among its `linears`.

        Args:
            names: Of those that the container holds so; by default all.
        """
        model = copy(self)
        outside = self._contents.get("outside", {})
        held = outside if names is None else {name: outside[name] for name in names}
        model._linears = self._linears | held
        model.linears = sorted(model._linears)
        return model

    def linear(self, name: str) -> QuantizedTensor:
        """Return a quantized linear layer."""
        entry = self._linears[name]
        kind = STORAGES[entry.get("kind", GROUPED)]
        tensor_class = cast(type[QuantizedTensor], load_object(kind))
        return tensor_class.from_parts(lambda part: self._read(entry, f"{name}.{part}"), entry)

    def scheme(self, name: str, columns: int) -> Scheme:
        """Return the scheme of a quantized linear layer with `columns` inputs."""
        entry = self._linears[name]
        if entry.get("kind", GROUPED) == GROUPED:
            return GroupedLinear.scheme_of(entry, columns)
        return self.linear(name).scheme

    def override(self, name: str) -> np.ndarray:
        """Return a tensor that replaces the source's, float32."""
        return self._read(self._contents["overrides"][name], f"override:{name}")

    def ggml_blocks(self, name: str) -> GgmlBlocks:
        """Return a tensor in ggml's blocks."""
        entry = self._contents["blocks"][name]
        data = self._read(entry, f"blocks:{name}")
        return GgmlBlocks(entry["type"], data, tuple(entry["shape"]))

    @property
    def activations_rounded(self) -> bool:
        """Whether the server rounds activations too."""
        return self.report.get("activations") is not None


def open_quantized(folder: Path, name: str, recipe: Recipe) -> QuantizedModel:
    """Open what the stage `quantize` made of a recipe.

    Args:
        folder: The store.
        name: Of the recipe.
        recipe: Its options, as params.yaml has them now.

    Raises:
        StageError: missing_file (reason export_artifact_missing); artifact_changed, if the weights
            are of another recipe.
    """
    path = folder / REPORT
    check_made(path, f"quantize@{name}", Reason.EXPORT_ARTIFACT_MISSING)
    quantized = QuantizedModel(folder)
    wanted = {"name": name, **recipe.model_dump(mode="json")}
    found = quantized.report["recipe"]
    if found != wanted:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected weights of {wanted}, found those of {found}; run "
            f"`dvc repro quantize@{name}`",
        )
    return quantized
