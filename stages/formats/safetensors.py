"""Safetensors: the plain Hugging Face folder, or compressed-tensors' pack-quantized layout, which vLLM and transformers
load. Tensors are read one by one; the model is never built."""

import fcntl
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from stages.checkpoints.architecture import architecture
from stages.checkpoints.canonical import GroupedLinear, Quantized
from stages.checkpoints.links import FICLONE
from stages.checkpoints.reader import INDEX, SINGLE, Checkpoint
from stages.checkpoints.source import SIDE_FILES
from stages.config import Variant
from stages.formats import StoredTensor
from stages.tracking import Failure, StageError, write_json

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LONG = {short: long for long, short in NAMES.items()}
SHARD_BYTES = 2 << 30  # a shard is in memory until it is written
GROUP = "group_0"  # the one scheme of quantization_config, by which all quantized layers are stored


def write(model: Checkpoint, quantized: Quantized, folder: Path, variant: Variant) -> dict[str, str]:
    """Write the folder; returns source tensor name → requested type. Raises StageError(unsupported_width)."""
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

    shards, schemes = _Shards(folder), set()
    for name in model.names:
        module, dtype = name.removesuffix(".weight"), DTYPES[kinds[name]]
        if module in quantized.linears:
            linear = quantized.linear(module)
            kinds[name] = f"int{linear.bits}"
            whole = linear.group_size == linear.integers.shape[1]
            schemes.add((linear.bits, linear.symmetric, linear.group_size, whole))
            shards.add(packed(module, linear, dtype))
        else:
            shards.add({name: values(model, quantized, name, dtype)})
    shards.close()
    config = dict(model.config)
    kind = variant.dtype or LONG[model.stored_dtype(architecture(model).embedding)]
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = kind
    if schemes:
        config["quantization_config"] = quantization_config(schemes)
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


def packed(module: str, linear: GroupedLinear, dtype: type) -> dict[str, np.ndarray]:
    """A layer's tensors in pack-quantized layout, by compressed-tensors' own packing.

    Integers are packed along the inputs and zero points along the outputs, both moved by 2^(bits-1) to signed numbers.
    """
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def pack(unsigned: np.ndarray, axis: int) -> np.ndarray:
        signed = torch.from_numpy(unsigned.astype(np.int16) - (1 << (linear.bits - 1))).to(torch.int8)
        return pack_to_int32(signed, linear.bits, packed_dim=axis).contiguous().numpy()

    tensors = {
        f"{module}.weight_packed": pack(linear.integers, 1), f"{module}.weight_scale": linear.scales.astype(dtype),
        f"{module}.weight_shape": np.array(linear.integers.shape, np.int64),
    }
    if not linear.symmetric:
        tensors[f"{module}.weight_zero_point"] = pack(linear.zeros, 0)
    return tensors


def quantization_config(schemes: set[tuple[int, bool, int, bool]]) -> dict:
    """The quantization_config of config.json, by compressed-tensors' own schema.

    `schemes` holds (bits, symmetric, group size, whether a group is the whole row) of every layer. Raises
    StageError(unsupported_width) if they are not one scheme; only rows that are one group each may differ in length.
    """
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    channel = all(whole for *_, whole in schemes)
    found = sorted({(bits, symmetric, None if channel else size) for bits, symmetric, size, _ in schemes})
    if len(found) != 1:
        raise StageError(Failure.UNSUPPORTED_WIDTH, f"expected one width and group size for all layers, found {found}; "
                                                    "quantize them with one recipe")
    bits, symmetric, size = found[0]
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, group_size=size,
                               strategy="channel" if channel else "group")
    return QuantizationConfig(
        config_groups={GROUP: QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"],
        format="pack-quantized", quantization_status=QuantizationStatus.COMPRESSED,
    ).model_dump(mode="json")


def read_back(folder: Path, model: Checkpoint) -> dict[str, StoredTensor]:
    """What the folder holds, under the source's names."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config.get("quantization_config")
    bits = config["config_groups"][GROUP]["weights"]["num_bits"] if config else 0
    found = {}
    for name in model.names:
        module = name.removesuffix(".weight")
        if name in checkpoint.files:
            kind, shape = checkpoint.stored_dtype(name), checkpoint.shape(name)
            size = int(np.prod(shape)) * np.dtype(DTYPES[kind]).itemsize
            found[name] = StoredTensor(kind, shape, size, lambda name=name: checkpoint.tensor(name))
        elif f"{module}.weight_packed" in checkpoint.files:
            parts = [f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")]
            shape = tuple(int(size) for size in checkpoint.raw(f"{module}.weight_shape"))
            found[name] = StoredTensor(
                f"int{bits}", shape, sum(checkpoint.raw(one).nbytes for one in parts if one in checkpoint.files),
                lambda module=module, shape=shape: _dequantize(checkpoint, module, shape, bits))
    return found


def _dequantize(checkpoint: Checkpoint, module: str, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The weight float32 [out, in] that a packed layer stands for."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    def unpack(part: str, size: tuple[int, ...], axis: int) -> np.ndarray:
        words = torch.from_numpy(checkpoint.raw(f"{module}.{part}"))
        return unpack_from_int32(words, bits, torch.Size(size), packed_dim=axis).numpy().astype(np.float32)

    scales = checkpoint.tensor(f"{module}.weight_scale")
    grouped = unpack("weight_packed", shape, 1).reshape(shape[0], scales.shape[1], -1)
    if f"{module}.weight_zero_point" in checkpoint.files:
        grouped = grouped - unpack("weight_zero_point", scales.shape, 0)[:, :, None]
    return (grouped * scales[:, :, None]).reshape(shape)


def expected(model: Checkpoint, quantized: Quantized, name: str, kind: str) -> np.ndarray:
    """The values, float32, that a tensor stored as `kind` has to have."""
    module = name.removesuffix(".weight")
    if module in quantized.linears:
        return quantized.linear(module).dequantize()
    return values(model, quantized, name, DTYPES[kind]).astype(np.float32)
