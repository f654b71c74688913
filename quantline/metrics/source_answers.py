"""What the unquantized model answers to the prompts of the smoke test.

That is right, whatever it is: nothing at all, one word again and again, or odd text. It is computed
once and stored, so that no bundle's test loads the unquantized model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from quantline.errors import Failure, StageError
from quantline.files import versions, write_json
from quantline.metrics.baseline import generate, run_rows
from quantline.model.checkpoint import Checkpoint
from quantline.model.output_head import OutputHead
from quantline.runtimes.smoke.answers import FILE, prompt_ids
from quantline.text.tokenizer import Tokenizer

# The unquantized model runs block by block, once for each token: the first ones tell enough.
MOST_TOKENS = 8
LABEL = "smoke prompts"


def answer_prompts(checkpoint: Checkpoint, prompts: list[str], tokens: int) -> list[dict[str, Any]]:
    """Answer prompts greedily with the unquantized model.

    Args:
        checkpoint: The unquantized model.
        prompts: Texts to answer.
        tokens: How many tokens to generate for each, of which MOST_TOKENS are.

    Returns:
        Of each prompt {prompt, ids: its tokens, token_ids: the answer's, end: the tokens that end
        it, ended: the one that did or None, output: the answer's text, end_gap: by how many nats
        the first token was more likely than any end}.

    Raises:
        StageError: non_finite; config_invalid, for a prompt without tokens.
    """
    tokenizer = Tokenizer(checkpoint.folder)
    head = OutputHead.of(checkpoint)
    end = sorted(tokenizer.end_tokens)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    most = min(tokens, MOST_TOKENS)
    jobs = {(tuple(row), most, frozenset(end)) for row in ids}
    generated = generate(checkpoint, head, jobs, LABEL)
    answers: list[dict[str, Any]] = []
    for prompt, row in zip(prompts, ids, strict=True):
        token_ids = generated[tuple(row), most, frozenset(end)]
        answers.append(
            {
                "prompt": prompt,
                "ids": row,
                "token_ids": token_ids,
                "end": end,
                "output": tokenizer.decode(token_ids),
            }
        )
    for answer, (gap, ended) in zip(answers, _ends(checkpoint, head, answers, most), strict=True):
        answer |= {"end_gap": gap, "ended": ended}
    return answers


def _ends(
    checkpoint: Checkpoint, head: OutputHead, answers: list[dict[str, Any]], most: int
) -> list[tuple[float | None, int | None]]:
    """Return end_gap and ended of each answer. Raises StageError: non_finite."""
    rows = [tuple(answer["ids"] + answer["token_ids"]) for answer in answers]
    hidden = run_rows(checkpoint, rows, LABEL)
    found: list[tuple[float | None, int | None]] = []
    for answer, row, states in zip(answers, rows, hidden, strict=True):
        first = head.logprobs(states[len(answer["ids"]) - 1 : len(answer["ids"])])[0]
        if not np.isfinite(first).all():
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite probabilities after the prompt {answer['prompt']!r} of the "
                "unquantized model, found NaN or infinity; look at the model",
            )
        ends = first[answer["end"]]
        gap = float(first.max() - ends.max()) if len(ends) else None
        ended = None
        if len(answer["token_ids"]) < most:
            ended = int(head.logprobs(states[len(row) - 1 : len(row)])[0].argmax())
        found.append((gap, ended))
    return found


def write_answers(
    checkpoint: Checkpoint, prompts: list[str], tokens: int, folder: Path
) -> list[dict[str, Any]]:
    """Write answers.json; arguments, returns and raises are as in `answer_prompts`."""
    answers = answer_prompts(checkpoint, prompts, tokens)
    info = {"prompts": answers, "versions": versions("torch", "transformers", "tokenizers")}
    write_json(folder / FILE, info)
    return answers
