"""llama.cpp's own quantization of a GGUF file, in all threads, as one process of benchmarks.gguf.

python -m benchmarks.gguf.llama_cpp bf16.gguf quantized.gguf Q4_K_M --importance imatrix.gguf
"""

import argparse
import ctypes
import os
from pathlib import Path

import llama_cpp


def quantize(source: Path, target: Path, mix: str, importance: Path | None) -> None:
    """Quantize a file with llama_model_quantize.

    Args:
        source: A GGUF file of floats.
        target: The file to write.
        mix: llama.cpp's name for the choice of types.
        importance: The importance matrix, if there is one.

    Raises:
        SystemExit: If it fails.
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = os.cpu_count()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
    if importance:
        # Imported here alone, since the time of imports counts.
        from quantline.formats.gguf.imatrix import read_importance

        matrix = read_importance(importance)
        # llama.cpp keeps pointers to these arrays, which have to live until it has ended.
        values = {name: entry.values().reshape(-1) for name, entry in matrix.entries.items()}
        array_type = llama_cpp.llama_model_imatrix_data * (len(values) + 1)
        entries = array_type()  # the last one stays empty, which ends the list
        for entry, (name, numbers) in zip(entries, values.items(), strict=False):
            entry.name = name.encode()
            entry.size = len(numbers)
            entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    )
    if failed:
        raise SystemExit("llama_model_quantize failed; its messages are above")


def main() -> None:
    """Quantize what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("mix")
    parser.add_argument("--importance", type=Path)
    options = parser.parse_args()
    quantize(options.source, options.target, options.mix, options.importance)


if __name__ == "__main__":
    main()
