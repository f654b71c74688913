"""A GGUF file as a source: its metadata become config.json and a tokenizer, its tensors plain ones.

transformers reads what it knows of such files; what it passes over is completed from the metadata,
and a key that says something about the model which nobody understood is a refusal.
"""

from quantline.ingest.dequantize.gguf.agreement import check_agreement
from quantline.ingest.dequantize.gguf.folder import write_folder

__all__ = ["check_agreement", "write_folder"]
