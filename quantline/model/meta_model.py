"""The model that a config.json describes, as transformers' own code builds it, without weights."""

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantline.errors import StageError
from quantline.model.configuration import refusal, transformers_config


def meta_model(config: dict[str, Any]) -> PreTrainedModel:
    """Build the model on the meta device, in float32, with none of the checkpoint's code.

    Buffers that are not stored are real.

    Args:
        config: The content of config.json.

    Raises:
        StageError: unsupported_architecture, for a value that transformers cannot build from.
    """
    known = transformers_config(config)
    try:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(
                known, dtype=torch.float32, trust_remote_code=False
            )
    except StageError:
        raise
    except Exception as error:  # whatever a strange value breaks
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise refusal(None, f"values that a {known.model_type} can be built of", words) from error
