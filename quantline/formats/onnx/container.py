"""ONNX with a key-value cache: floats, or integers in place of linear layers and embedding."""

from pathlib import Path
from typing import Any

import numpy as np

from quantline.config.variants import Variant
from quantline.files import write_json
from quantline.formats.bundle.hugging_face import HuggingFaceContainer, copy_side_files
from quantline.formats.bundle.unquantized import unquantized_values
from quantline.formats.container import StoredTensor
from quantline.formats.onnx import genai_config
from quantline.formats.onnx.rope import check_rope, limits
from quantline.formats.onnx.serve import serve_text
from quantline.formats.onnx.sizes import is_large
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel

# Whole numbers, as safetensors and as ONNX name their types.
WHOLE_NUMBERS = {"I64": "INT64", "I32": "INT32", "I16": "INT16", "I8": "INT8", "U8": "UINT8"}


class OnnxContainer(HuggingFaceContainer):
    """ONNX. onnx and torch are imported only to write and to read back."""

    def write(
        self, source: Checkpoint, quantized: QuantizedModel, folder: Path, variant: Variant
    ) -> dict[str, str]:
        """Write model.onnx, and for a large model model.onnx.data beside it.

        For onnxruntime-genai, genai_config.json is written too.

        Returns:
            Source tensor → the type that was asked for.

        Raises:
            StageError: unsupported_width, missing_tokenizer, unsupported_architecture.
        """
        check_rope(source.arch)
        from quantline.formats.onnx.graph import graph_of
        from quantline.formats.onnx.model_file import FILE, write_model

        graph = graph_of(source)
        if variant.runtime == genai_config.RUNTIME:
            config = genai_config.make_config(source, graph, FILE)
            write_json(folder / genai_config.FILE, config)
        held = quantized.with_outside()
        requested = {name: _requested(source, held, name, variant) for name in source.names}
        halves = {name for name, kind in requested.items() if kind == "F16"}
        write_model(graph, source, held, folder, halves)
        copy_side_files(source.folder, folder)
        return requested

    def read_back(self, folder: Path, source: Checkpoint) -> dict[str, StoredTensor]:
        """Return what the graph really computes with, under the source's names."""
        from quantline.formats.onnx.model_file import read_model

        return read_model(folder, source)

    def expected(
        self, source: Checkpoint, quantized: QuantizedModel, name: str, stored_type: str
    ) -> np.ndarray:
        """Return the values, float32, that a tensor has to have."""
        held = quantized.with_outside()
        layer = name.removesuffix(".weight")
        if layer in held.linears:
            return held.linear(layer).dequantize()
        values = unquantized_values(source, held, name)
        return values.astype(np.float16).astype(np.float32) if stored_type == "F16" else values

    def open_source(self, model: Path) -> Checkpoint:
        """Open the model, of which a graph holds the text decoder alone."""
        source = super().open_source(model)
        source.passed = ()
        return source

    def limits(self, source: Checkpoint) -> list[str]:
        """Say where the graph is another model (see Container)."""
        said = limits(source.arch)
        if source.structure and source.structure.passed:
            count = len(source.structure.passed)
            said.append(
                f"the graph is the text decoder; {count} tensors of the checkpoint that it does "
                "not compute with, such as those of towers for images, are not in it"
            )
        return said

    def serve(self, manifest: dict[str, Any]) -> str:
        """Return the section "## Serve it" of a bundle's README."""
        return serve_text(manifest)


def _requested(source: Checkpoint, quantized: QuantizedModel, name: str, variant: Variant) -> str:
    """Return what a tensor shall be stored as."""
    layer = name.removesuffix(".weight")
    if layer in quantized.linears:
        return quantized.linear(layer).kind
    stored = source.stored_dtype(name)
    if not stored.startswith(("F", "BF")):
        return WHOLE_NUMBERS.get(stored, stored)
    halved = variant.dtype == "float16" or (variant.dtype is None and bool(quantized.linears))
    return "F16" if halved and is_large(source.shape(name)) else "F32"
