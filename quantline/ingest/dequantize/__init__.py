"""Quantized checkpoints as sources: their tensors become plain ones, and the reference is those.

`settings_of` finds what config.json says of a quantization, `check` refuses what cannot be read
before any weights are fetched, and `dequantize` writes the plain checkpoint. A GGUF file is such a
source too; `gguf_file` reads it.
"""

from quantline.ingest.dequantize.checkpoint import check, check_plain, dequantize, settings_of

__all__ = ["check", "check_plain", "dequantize", "settings_of"]
