"""A prompt and its answer as token ids, which depend on each other where the two meet."""

from collections.abc import Callable

Encode = Callable[[str], list[int]]


def encode_join(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Encode a context with its continuation, and part the ids where the context alone ends.

    The rule is that of lm-evaluation-harness (`TemplateLM._encode_pair`): white space at the end of
    the context belongs to the continuation, as tokens hold the space before a word. Encoding the
    two on their own would give ids that the model never reads one after the other.

    Args:
        encode: Returns the ids of a text as the model reads it.
        context: A text that is not blank.
        continuation: What follows.

    Returns:
        The ids of the context and of the continuation.
    """
    before = encode(context.rstrip())
    return before, encode(context + continuation)[len(before) :]
