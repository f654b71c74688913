"""Digests of what a fixed model becomes in every container, and in ggml's blocks.

python -m tests.golden.digests     # writes tests/golden/digests.json anew, if a change is meant

No product of matrices comes in, whose last bits depend on the processor: weights come from numpy's
generator, and they are rounded to nearest.
"""

import json
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from quantline.files import sha256_file
from quantline.methods.ggml.quantize import quantize_blocks
from tests.helpers.bundles import NONE, RTN, export, loaded_model, store_of
from tests.helpers.models import write_model

EXPECTED = Path(__file__).with_suffix(".json")
BUNDLES = {
    "safetensors, unquantized": ("safetensors", NONE, {}),
    "gguf, unquantized": ("gguf", NONE, {}),
    "compressed-tensors": ("safetensors", RTN, {}),
    "gptq": ("safetensors", RTN, {"layout": "gptq"}),
    "awq": ("safetensors", RTN | {"symmetric": False}, {"layout": "awq"}),
    "onnx": ("onnx", RTN, {}),
}
BLOCK_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data")


def fixed_model(folder: Path) -> Path:
    """Write a tiny Llama whose weights any machine draws alike."""
    write_model(folder)
    path = folder / "model.safetensors"
    generator = np.random.default_rng(0)
    tensors = {}
    for name, tensor in sorted(load_file(path).items()):
        values = generator.normal(scale=0.05, size=tensor.shape)
        tensors[name] = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def digests(folder: Path) -> dict[str, str]:
    """Make everything in an empty folder; return file or block type → sha256."""
    model = loaded_model(folder / "model", fixed_model(folder / "checkpoint"))
    found = {}
    for number, (label, (format, recipe, options)) in enumerate(BUNDLES.items()):
        store = store_of(folder / f"store-{number}", model, recipe)
        bundle = folder / f"bundle-{number}"
        export(bundle, model, store, format, **options)
        for pattern in WEIGHT_FILES:
            for path in sorted(bundle.glob(pattern)):
                found[f"{label}: {path.name}"] = sha256_file(path)
    weight = np.random.default_rng(1).normal(size=(8, 512)).astype(np.float32)
    importance = np.random.default_rng(2).random(512).astype(np.float32)
    for name in BLOCK_TYPES:
        blocks = quantize_blocks(weight, name, importance, kernel="numba")
        path = folder / name
        path.write_bytes(blocks.tobytes())
        found[name] = sha256_file(path)
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        text = json.dumps(digests(Path(temporary)), indent=1)
    EXPECTED.write_text(text + "\n", encoding="utf-8")
