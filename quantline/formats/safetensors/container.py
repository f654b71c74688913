"""Safetensors: the plain Hugging Face folder, or the same with quantized layers in a layout.

Tensors are read one by one; the model is never built.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quantline.config.variants import Variant
from quantline.files import write_json
from quantline.formats.bundle.hugging_face import HuggingFaceContainer, copy_side_files
from quantline.formats.bundle.unquantized import unquantized_values
from quantline.formats.container import StoredTensor
from quantline.formats.safetensors.fused import fused_tensors, keys_as_stored
from quantline.formats.safetensors.ignored import ignored_modules, module_names
from quantline.formats.safetensors.layouts.layout import (
    check_held,
    layout_of,
    load_layout,
    shared_group_size,
)
from quantline.formats.safetensors.loadable import check_grids, check_loadable
from quantline.formats.safetensors.serve import serve_text
from quantline.formats.safetensors.shards import ShardWriter
from quantline.links import clone_or_copy
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX
from quantline.model.dtypes import CONFIG_NAMES, NUMPY_DTYPES, STORED_NAMES
from quantline.quantized.store import QuantizedModel
from quantline.quantized.tensors import GroupedLinear, Scheme
from quantline.run.progress import progress


class SafetensorsContainer(HuggingFaceContainer):
    """Safetensors. torch is imported only for layouts that need it."""

    def write(
        self, source: Checkpoint, quantized: QuantizedModel, folder: Path, variant: Variant
    ) -> dict[str, str]:
        """Write a Hugging Face folder.

        Where nothing changes, it shares the bytes of the checkpoint's files.

        Returns:
            Source tensor → the type that was asked for.

        Raises:
            StageError: unsupported_width, readback_mismatch (scales that the layout cannot hold),
                and as `check_loadable` and `check_grids` do.
        """
        quantized = _held(source, quantized)
        schemes = _schemes(source, quantized)
        if schemes:
            activations = quantized.activations_rounded
            check_loadable(source.arch, variant.layout, schemes, activations)
            check_grids(source.arch, schemes)
        types = {name: _float_type(source, name, variant) for name in source.names}
        types |= {key: source.stored_dtype(key) for key in source.passed}
        copy_side_files(source.folder, folder)
        same_types = all(kind == source.stored_dtype(name) for name, kind in types.items())
        if same_types and not quantized.linears and not quantized.overrides:
            _share_weights(source, folder)
            return types
        return _write_tensors(source, quantized, folder, variant, types, schemes)

    def read_back(self, folder: Path, source: Checkpoint) -> dict[str, StoredTensor]:
        """Return what the folder holds, under the source's names."""
        checkpoint = Checkpoint(folder, source.configuration, source.structure)
        quantization = checkpoint.config.get("quantization_config")
        stored = {}
        for name in (*source.names, *source.passed):
            tensor = None
            if quantization:
                tensor = _stored_layer(checkpoint, name.removesuffix(".weight"), quantization)
            if tensor is None and name in checkpoint:
                tensor = _stored_floats(checkpoint, name)
            if tensor is not None:
                stored[name] = tensor
        return stored

    def expected(
        self, source: Checkpoint, quantized: QuantizedModel, name: str, stored_type: str
    ) -> np.ndarray:
        """Return the values, float32, that a tensor stored as `stored_type` has to have."""
        quantized = _held(source, quantized)
        module = name.removesuffix(".weight")
        if module in quantized.linears:
            return quantized.linear(module).dequantize()
        if name in source.passed:
            return source.raw(name)
        dtype = NUMPY_DTYPES[stored_type]
        return unquantized_values(source, quantized, name, dtype).astype(np.float32)

    def serve(self, manifest: dict[str, Any]) -> str:
        """Return the section "## Serve it" of a bundle's README."""
        return serve_text(manifest)


def _held(source: Checkpoint, quantized: QuantizedModel) -> QuantizedModel:
    """Return the quantized weights with the output head among them, if the recipe asks for it."""
    if not quantized.report["recipe"].get("safetensors_head"):
        return quantized
    return quantized.with_outside([_module_of_head(source)])


def _module_of_head(source: Checkpoint) -> str:
    return source.arch.head.removesuffix(".weight")


def _float_type(source: Checkpoint, name: str, variant: Variant) -> str:
    """Return the type of a tensor that is not quantized; tables of whole numbers keep theirs.

    A checkpoint that is in the type that is asked for stays as it is, with the few tensors that
    its authors keep in another.
    """
    stored = source.stored_dtype(name)
    is_float = stored in NUMPY_DTYPES and NUMPY_DTYPES[stored].kind not in "iub"
    wanted = STORED_NAMES[variant.dtype] if variant.dtype else None
    if wanted is None or wanted == source.stored_dtype(source.arch.embedding) or not is_float:
        return stored
    return wanted


def _share_weights(source: Checkpoint, folder: Path) -> None:
    """Give the bundle the weight files of the checkpoint."""
    for name in sorted({path.name for path in source.files.values()}):
        clone_or_copy(source.folder / name, folder / name)
    if (source.folder / INDEX).is_file():
        shutil.copyfile(source.folder / INDEX, folder / INDEX)


def _schemes(source: Checkpoint, quantized: QuantizedModel) -> dict[Scheme, list[str]]:
    """Return scheme → the quantized layers that are stored by it, in the order of the model."""
    schemes: dict[Scheme, list[str]] = {}
    for name in source.names:
        module = name.removesuffix(".weight")
        if module in quantized.linears:
            scheme = quantized.scheme(module, source.shape(name)[-1])
            schemes.setdefault(scheme, []).append(module)
    return schemes


def _write_tensors(
    source: Checkpoint,
    quantized: QuantizedModel,
    folder: Path,
    variant: Variant,
    types: dict[str, str],
    schemes: dict[Scheme, list[str]],
) -> dict[str, str]:
    """Write weights and config.json.

    Args:
        source: The unquantized model.
        quantized: The quantized weights.
        folder: Where to write.
        variant: What to export.
        types: Tensor → its type where it is not quantized.
        schemes: Scheme → the quantized layers that are stored by it.

    Returns:
        Source tensor → the type that was asked for.
    """
    layout = load_layout(variant.layout, quantized.activations_rounded)
    size = shared_group_size(schemes) if layout.one_grid and schemes else None
    shards = ShardWriter(folder)
    requested = {}
    # As config.json says below: the embedding's type is that of the model, whatever a layer's is.
    computed_in = NUMPY_DTYPES[types[source.arch.embedding]]
    as_stored = keys_as_stored(source, quantized)
    for name in progress(source.names, "writing", "tensor"):
        module = name.removesuffix(".weight")
        dtype = NUMPY_DTYPES[types[name]]
        if module in quantized.linears:
            linear = quantized.linear(module)
            requested[name] = linear.kind
            if size is not None and isinstance(linear, GroupedLinear):
                linear = linear.in_groups_of(size)
            check_held(module, linear, computed_in)
            shards.add(layout.tensors(module, linear, dtype))
            continue
        requested[name] = types[name]
        view = source.view_of(name)
        if view is not None and set(view.keys) <= as_stored:
            continue  # it is written with its stored tensors
        values = unquantized_values(source, quantized, name, dtype)
        shards.add({name: source.as_stored(name, values)})
    for key, values in fused_tensors(source, quantized, as_stored, types):
        shards.add({key: values})
    for key in source.passed:
        requested[key] = types[key]
        shards.add({key: source.raw(key)})
    shards.close()
    config = dict(source.config)
    is_older = "torch_dtype" in config and "dtype" not in config
    dtype_name = variant.dtype or CONFIG_NAMES[source.stored_dtype(source.arch.embedding)]
    config["torch_dtype" if is_older else "dtype"] = dtype_name
    if schemes:
        if size is not None:
            schemes = _regrouped(schemes, size)
        config["quantization_config"] = layout.config(
            {scheme: module_names(source, names) for scheme, names in schemes.items()},
            ignored_modules(source, quantized),
            module_names(source, source.arch.expert_linears()),
            module_names(source, [_module_of_head(source)]),
        )
    write_json(folder / "config.json", config)
    return requested


def _regrouped(schemes: dict[Scheme, list[str]], size: int) -> dict[Scheme, list[str]]:
    """Return the schemes of layers that are stored in groups of one size."""
    regrouped: dict[Scheme, list[str]] = {}
    for scheme, names in schemes.items():
        per_row = scheme.per_row and scheme.group_size == size
        alike = scheme._replace(group_size=size, per_row=per_row)
        regrouped.setdefault(alike, []).extend(names)
    return regrouped


def _stored_layer(
    checkpoint: Checkpoint, module: str, config: dict[str, Any]
) -> StoredTensor | None:
    """Describe a quantized layer of a bundle; None if it is not quantized.

    Args:
        checkpoint: The bundle.
        module: The layer.
        config: Its quantization_config.
    """
    layout = layout_of(config)
    part_names = layout.part_names(module)
    if part_names[0] not in checkpoint:
        return None
    size = sum(checkpoint.raw(part).nbytes for part in part_names if part in checkpoint)
    return StoredTensor(
        layout.stored_type(config, module),
        layout.shape(checkpoint, module),
        size,
        partial(layout.dequantize, checkpoint, module, config),
    )


def _stored_floats(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """Describe a tensor of a bundle that is not quantized."""
    kind = checkpoint.stored_dtype(name)
    shape = checkpoint.shape(name)
    size = int(np.prod(shape)) * NUMPY_DTYPES[kind].itemsize
    return StoredTensor(kind, shape, size, partial(checkpoint.number, name))
