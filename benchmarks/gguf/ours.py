"""Our way from a checkpoint to a quantized GGUF file, as one process of benchmarks.gguf.

python -m benchmarks.gguf.ours <folder> <into> Q4_K_M numba --importance imatrix.gguf

It is what the stages quantize and export do between reading the checkpoint and the finished file.
"""

import argparse
from pathlib import Path

from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.config.variants import Variant
from quantline.formats.gguf.container import GgufContainer
from quantline.model.checkpoint import Checkpoint
from quantline.quantized.store import QuantizedModel
from quantline.recipes.quantize import quantize_model


def quantize_and_export(
    folder: Path, into: Path, mix: str, kernel: str, importance: Path | None
) -> None:
    """Quantize a checkpoint by a mix and write the bundle's GGUF file.

    Args:
        folder: Holds `model` and `calibration`.
        into: Where `quantized` and `bundle` are written.
        mix: llama.cpp's name for the choice of types.
        kernel: Which search of blocks, "ggml" or "numba".
        importance: The importance matrix, if there is one.
    """
    recipe = parse_recipe(
        {
            "method": "kquant",
            "mix": mix,
            "kernel": kernel,
            "importance": False,
            "importance_file": str(importance) if importance else None,
        }
    )
    name = mix.lower()
    quantized = into / "quantized"
    bundle = into / "bundle"
    quantized.mkdir(parents=True)
    bundle.mkdir()
    checkpoint = Checkpoint(folder / "model")
    calibration = CalibrationStore(folder / "calibration")
    quantize_model(name, recipe, checkpoint, calibration, quantized)
    variant = Variant(recipe=name, format="gguf", runtime="llama.cpp")
    GgufContainer().write(checkpoint, QuantizedModel(quantized), bundle, variant)


def main() -> None:
    """Quantize what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("mix")
    parser.add_argument("kernel", choices=["ggml", "numba"])
    parser.add_argument("--importance", type=Path)
    options = parser.parse_args()
    quantize_and_export(
        options.folder, options.into, options.mix, options.kernel, options.importance
    )


if __name__ == "__main__":
    main()
