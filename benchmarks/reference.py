"""What the stage `reference` stores of given tokens, without a gold set."""

from pathlib import Path

import numpy as np

from quantline.files import write_json
from quantline.metrics.reference import write_reference
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint


def write_hidden_reference(checkpoint: Checkpoint, tokens: np.ndarray, folder: Path) -> Path:
    """Write final hidden states and the head into a new folder, and return it.

    Args:
        checkpoint: The unquantized model.
        tokens: int32 [sequences, length].
        folder: It is made.
    """
    folder.mkdir()
    hidden = final_hidden_states(checkpoint, tokens, "reference")
    write_reference(folder, checkpoint, tokens, hidden)
    scale = {
        "logit_scale": checkpoint.arch.logit_scale,
        "logit_softcap": checkpoint.arch.logit_softcap,
    }
    write_json(folder / "reference.json", scale)
    return folder
