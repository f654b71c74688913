"""Safetensors: the plain Hugging Face folder, or the same with quantized layers in one of the layouts that servers load
(stages/formats/layouts/). Tensors are read one by one; the model is never built."""

import fcntl
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from quantline.model.architecture import architecture
from quantline.quantized.store import Quantized
from quantline.ingest.reflink import FICLONE
from quantline.model.checkpoint import INDEX, SINGLE, Checkpoint
from quantline.ingest.fetch import SIDE_FILES
from quantline.config.params import Variant
from quantline.formats.container import StoredTensor
from quantline.formats.safetensors.layouts.layout import (
    check_loadable,
    check_mixture,
    layout_of,
    load_layout,
)
from quantline.files import write_json

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LONG = {short: long for long, short in NAMES.items()}
SHARD_BYTES = 2 << 30  # a shard is in memory until it is written


def write(model: Checkpoint, quantized: Quantized, folder: Path, variant: Variant) -> dict[str, str]:
    """Write the folder; returns source tensor name → requested type.

    Raises StageError: unsupported_width, readback_mismatch (scales that the layout cannot hold), and as
    `layouts.check_loadable` and `layouts.check_mixture` do.
    """
    facts, activations = architecture(model), quantized.report.get("activations") is not None
    for name in quantized.linears[:1]:
        check_loadable(facts, variant.layout, quantized.linear(name).scheme, activations)
    kinds = {name: NAMES[variant.dtype] if variant.dtype else model.stored_dtype(name) for name in model.names}
    for name in SIDE_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    unchanged = all(kind == model.stored_dtype(name) for name, kind in kinds.items())
    if unchanged and not quantized.linears and not quantized.overrides:
        for name in sorted({path.name for path in model.files.values()}):
            share(model.folder / name, folder / name)
        if (model.folder / INDEX).is_file():
            shutil.copyfile(model.folder / INDEX, folder / INDEX)
        return kinds

    layout = load_layout(variant.layout, activations)
    shards, schemes = _Shards(folder), {}
    for name in model.names:
        module, dtype = name.removesuffix(".weight"), DTYPES[kinds[name]]
        if module in quantized.linears:
            linear = quantized.linear(module)
            kinds[name] = linear.kind
            schemes.setdefault(linear.scheme, []).append(module)
            shards.add(layout.tensors(module, linear, dtype))
        else:
            shards.add({name: model.as_stored(name, values(model, quantized, name, dtype))})
    shards.close()
    config = dict(model.config)
    kind = variant.dtype or LONG[model.stored_dtype(facts.embedding)]
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = kind
    if schemes:
        check_mixture(facts, schemes)
        config["quantization_config"] = layout.config(schemes, facts.kept)
    write_json(folder / "config.json", config)
    return kinds


def share(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`, sharing them where the file system can (a reference link).

    Never by a hard link: DVC makes what it caches read-only, and under a hard link that would be the user's own file.
    """
    with source.open("rb") as read, target.open("wb") as write_:
        try:
            fcntl.ioctl(write_.fileno(), FICLONE, read.fileno())
        except OSError:
            shutil.copyfileobj(read, write_, 1 << 24)


def values(model: Checkpoint, quantized: Quantized, name: str, dtype: type) -> np.ndarray:
    """A tensor that is not quantized, in `dtype`: the method's where it has one, else the source's."""
    return (quantized.override(name) if name in quantized.overrides else model.raw(name)).astype(dtype, copy=False)


class _Shards:
    """Writes tensors in the order given, a new file every few GiB, and an index if there are several."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tensors, self.bytes, self.files, self.total = folder, {}, 0, [], 0

    def add(self, tensors: dict[str, np.ndarray]) -> None:
        """The tensors of one layer, which stay in one file."""
        size = sum(one.nbytes for one in tensors.values())
        if self.tensors and self.bytes + size > SHARD_BYTES:
            self._flush()
        self.tensors |= tensors
        self.bytes += size
        self.total += size

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self.files)}"
        save_file(self.tensors, path, metadata={"format": "pt"})
        self.files.append((path, sorted(self.tensors)))
        self.tensors, self.bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and give the files their names."""
        self._flush()
        count = len(self.files)
        if count == 1:
            self.files[0][0].rename(self.folder / SINGLE)
            return
        weight_map = {}
        for number, (path, names) in enumerate(self.files, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.total}, "weight_map": weight_map})


def read_back(folder: Path, model: Checkpoint) -> dict[str, StoredTensor]:
    """What the folder holds, under the source's names."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config.get("quantization_config")
    layout = layout_of(config) if config else None
    found = {}
    for name in model.names:
        module = name.removesuffix(".weight")
        parts = [one for one in layout.parts(module) if one in checkpoint.files] if layout else []
        if parts and parts[0] == layout.parts(module)[0]:
            found[name] = StoredTensor(
                layout.kind(config, module), layout.shape_of(checkpoint, module), sum(checkpoint.raw(one).nbytes for one in parts),
                lambda module=module: layout.dequantize(checkpoint, module, config))
        elif name in checkpoint.files:
            kind, shape = checkpoint.stored_dtype(name), checkpoint.shape(name)
            size = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
            found[name] = StoredTensor(kind, shape, size, lambda name=name: checkpoint.tensor(name))
    return found


def expected(model: Checkpoint, quantized: Quantized, name: str, kind: str) -> np.ndarray:
    """The values, float32, that a tensor stored as `kind` has to have."""
    module = name.removesuffix(".weight")
    if module in quantized.linears:
        return quantized.linear(module).dequantize()
    return values(model, quantized, name, DTYPES[kind]).astype(np.float32)
