"""A model of transformers that goes on where it stopped, whatever it keeps of what it has read."""

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


class Read(NamedTuple):
    """What a model has read.

    Attributes:
        tokens: All of it [b, n].
        kept: The model's own memory of it by its name, to be given to it with the next tokens;
            empty for a model that keeps none and has to read everything again.
    """

    tokens: "torch.Tensor"
    kept: dict[str, Any]


class ContinuedModel:
    """Runs a model on the next tokens.

    Attention keeps keys and values, state spaces a state of another name, and some old models
    nothing. The names are those that transformers itself generates with.
    """

    def __init__(self, model: Any) -> None:
        """Take a model that `from_pretrained` has returned."""
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
        self._takes = None if takes_any else set(parameters)

    def run(
        self, tokens: "torch.Tensor", read: Read | None, **options: Any
    ) -> tuple["torch.Tensor", Read]:
        """Return the logits after the next tokens, and what has been read then.

        Args:
            tokens: The next ones [b, n].
            read: What `run` has returned for those before; None at the beginning.
            **options: For the model, if it takes them.

        Returns:
            Logits [b, n, vocabulary]; of the last token alone with `logits_to_keep=1`.
        """
        import torch

        kept = read.kept if read else {}
        whole = tokens if read is None else torch.cat([read.tokens, tokens], 1)
        wanted = {"use_cache": True, **options, **kept}
        if self._takes is not None:
            wanted = {name: value for name, value in wanted.items() if name in self._takes}
        out = self.model(input_ids=tokens if kept else whole, **wanted)
        logits = out.logits[:, -tokens.shape[1] :]
        return logits, Read(whole, _kept_by(out))


def _kept_by(out: Any) -> dict[str, Any]:
    """Return what a model has kept, under the name by which it takes it again."""
    from transformers.generation.utils import ALL_CACHE_NAMES

    for name in ALL_CACHE_NAMES:
        if out.get(name) is not None:
            # Two old models take it by another name than they give it.
            taken = "past_key_values" if name in ("mems", "past_buckets_states") else name
            return {taken: out[name]}
    return {}
