"""What a checkpoint has to be: safe, whole, finite, and a causal language model.

`check_config` and `check_listing` come before any weights are fetched, the others after.
"""

from quantline.ingest.verify.blocks import check_blocks, check_runs
from quantline.ingest.verify.config import check_config
from quantline.ingest.verify.weights import (
    check_checkpoint,
    check_fit,
    check_has_tokenizer,
    check_listing,
    check_tokenizer,
)

__all__ = [
    "check_blocks",
    "check_checkpoint",
    "check_config",
    "check_fit",
    "check_has_tokenizer",
    "check_listing",
    "check_runs",
    "check_tokenizer",
]
