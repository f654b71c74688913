"""The unquantized model's own figures: perplexity, and its answers to the gold set.

Memory does not grow with the depth of the model: it runs one decoder block at a time.
"""

import numpy as np

from quantline.errors import Failure, StageError
from quantline.metrics.gold_set import TokenizedItem
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.output_head import OutputHead
from quantline.text.tokenizer import Tokenizer

CHUNK_VALUES = 1 << 24  # log-probabilities held at once, so that a large vocabulary fits

Row = tuple[int, ...]  # token ids
# What is generated: the prompt, how many tokens at most, and the tokens that end the answer.
Job = tuple[Row, int, frozenset[int]]


def run_rows(checkpoint: Checkpoint, rows: list[Row], label: str) -> np.ndarray:
    """Return final hidden states float32 [rows, longest, D] of rows padded on the right."""
    longest = max(len(row) for row in rows)
    padded = np.array([row + (0,) * (longest - len(row)) for row in rows], np.int32)
    return final_hidden_states(checkpoint, padded, label)


def generate(
    checkpoint: Checkpoint, head: OutputHead, jobs: set[Job], label: str
) -> dict[Job, list[int]]:
    """Decode greedily, a token of all jobs in each pass; return the new tokens of each.

    Args:
        checkpoint: The unquantized model.
        head: Its output head.
        jobs: What to generate.
        label: Of the progress bar.
    """
    ordered = sorted(jobs, key=lambda job: (job[0], job[1], sorted(job[2])))
    generated: dict[Job, list[int]] = {job: [] for job in ordered}
    unfinished = ordered
    while unfinished:
        rows = [job[0] + tuple(generated[job]) for job in unfinished]
        states = run_rows(checkpoint, rows, label)
        remaining = []
        for job, row, hidden in zip(unfinished, rows, states, strict=True):
            last = hidden[len(row) - 1 : len(row)]
            token = int(head.logprobs(last)[0].argmax())
            _prompt, max_tokens, end = job
            if token in end:
                continue
            generated[job].append(token)
            if len(generated[job]) < max_tokens:
                remaining.append(job)
        unfinished = remaining
    return generated


class UnquantizedModel:
    """The unquantized model as scoring needs it (see ScoringModel).

    Each weight is read once for all items: all sequences go through the blocks together, before
    the first item is scored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        head: OutputHead,
        tokenizer: Tokenizer,
        items: list[TokenizedItem],
    ) -> None:
        """Run and generate what scoring the items takes."""
        self.checkpoint = checkpoint
        self.head = head
        self.tokenizer = tokenizer
        sequences: set[Row] = set()
        jobs: set[Job] = set()
        for item in items:
            for tokens in item.continuations:
                # As score_continuations runs them: without the last token.
                sequences.add(tuple(item.prompt + tokens)[:-1])
            if item.kind == "generated":
                end = frozenset(item.end or ())
                jobs.add((tuple(item.prompt), item.max_tokens, end))
        rows = sorted(sequences)
        self.hidden: dict[Row, np.ndarray] = {}
        if rows:
            states = run_rows(checkpoint, rows, "gold set")
            self.hidden = dict(zip(rows, states, strict=True))
        self.generated = generate(checkpoint, head, jobs, "gold set, generating")

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return log-probabilities float32 [b, n, V] of sequences that were run.

        Args:
            tokens: int32 [b, n], padded on the right.
        """
        width = tokens.shape[1]
        rows = [self._row_that_begins(line) for line in tokens.tolist()]
        return np.stack([self.head.logprobs(self.hidden[row][:width]) for row in rows])

    def _row_that_begins(self, line: list[int]) -> Row:
        """Return the longest sequence that was run and that a padded one begins with."""
        for length in range(len(line), 0, -1):
            row = tuple(line[:length])
            if row in self.hidden:
                return row
        raise KeyError("these tokens are of none of the items that the model was made for")

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Return what was generated for one of the items."""
        return self.generated[tuple(prompt), max_new_tokens, frozenset(stop)]

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self.tokenizer.decode(ids)


def perplexity(head: OutputHead, hidden: np.ndarray, tokens: np.ndarray) -> float:
    """Return exp of the mean negative log-likelihood of every token but the first of a sequence.

    Args:
        head: The model's output head.
        hidden: Final hidden states, float32 [n, length, D].
        tokens: int32 [n, length].

    Raises:
        StageError: non_finite.
    """
    step = max(1, CHUNK_VALUES // len(head))
    states = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    following = tokens[:, 1:].reshape(-1)
    total = 0.0
    for start in range(0, len(following), step):
        wanted = following[start : start + step]
        logprobs = head.logprobs(states[start : start + step])
        values = logprobs[np.arange(len(wanted)), wanted]
        total -= float(values.sum(dtype=np.float64))
    value = float(np.exp(total / len(following)))
    if not np.isfinite(value):
        raise StageError(
            Failure.NON_FINITE,
            f"expected a finite perplexity of the unquantized model, found {value}; look at the "
            "model and at the evaluation text",
        )
    return value
