"""Whether a model runs, and block by block as transformers runs it."""

import numpy as np

from quantline.causes import OF_MACHINE, failure_of, reading_foreign
from quantline.errors import Failure, StageError
from quantline.model.checkpoint import Checkpoint
from quantline.model.configuration import CONFIG

CHECKED_TOKENS = 32
LOGIT_TOLERANCE = 1e-4  # of the greatest logit


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, f"a {CONFIG} that transformers' own model runs")
def check_runs(checkpoint: Checkpoint) -> None:
    """Refuse what transformers builds and cannot run, such as an unknown kind of attention.

    Raises:
        StageError: unsupported_architecture.
    """
    from quantline.model.block_runner import prepare_blocks

    prepare_blocks(checkpoint)


def check_blocks(checkpoint: Checkpoint) -> None:
    """Compare the logits of the run block by block with those of transformers' forward pass.

    Done for a family that has no table, so that nothing is measured on another model.

    Raises:
        StageError: unsupported_architecture, also if the logits are not finite.
    """
    import torch

    from quantline.model.block_runner import final_hidden_states, full_model_logits
    from quantline.model.output_head import OutputHead

    arch = checkpoint.arch
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, arch.vocab_size, (1, CHECKED_TOKENS)).astype(np.int32)
    try:
        wanted = full_model_logits(checkpoint, tokens)
        hidden = final_hidden_states(checkpoint, tokens, "checking blocks")
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        if failure_of(error) in OF_MACHINE:  # torch says in words alone that there is no memory
            raise
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"{arch.model_type} does not run block by block: {error!r}; take another model",
        ) from error
    head = OutputHead.of(checkpoint).to_torch(torch.device("cpu"))
    logits = head.logits(torch.from_numpy(hidden))
    difference = float((logits - wanted).abs().max())
    size = float(wanted.abs().max())
    if not difference <= LOGIT_TOLERANCE * size:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected the logits of {arch.model_type} run block by block to be transformers' "
            f"own, found a difference of {difference:.3g} of {size:.3g}; take another model",
        )
