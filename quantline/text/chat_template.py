"""Rendering a chat with a model's own template, as transformers does but with a clock that stands.

This is the only place where a template, which is code that strangers wrote, runs.
"""

from datetime import datetime
from functools import lru_cache
from typing import Any

from quantline.errors import Failure, StageError
from quantline.run.bounded_call import BoundedCall

# Templates that write today's date give the same prompt every day: that of this day.
TODAY = datetime(2024, 7, 26, 12, 0, 0)


def render(
    template: str,
    messages: list[dict[str, Any]],
    generation_prompt: bool,
    tokens: dict[str, str],
) -> str:
    """Render messages as `apply_chat_template(messages, tokenize=False)` does on the day TODAY.

    It is done within bounds of time and memory.

    Args:
        template: In Jinja.
        messages: Each with role and content.
        generation_prompt: Whether the text ends where the assistant's answer begins.
        tokens: Special tokens by name, which are variables of the template.

    Raises:
        StageError: dataset_invalid, if the template is broken or refuses the messages; timed_out,
            out_of_memory.
    """
    # Here, so that the copy of this process which renders has it as well.
    import transformers.utils.chat_template_utils  # noqa: F401

    return _bounded(template, messages, generation_prompt, tokens)


def _render(
    template: str,
    messages: list[dict[str, Any]],
    generation_prompt: bool,
    tokens: dict[str, str],
) -> str:
    """Render messages; arguments and errors are as for `render`."""
    from jinja2.exceptions import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _alias_reasoning_fields

    variables: dict[str, Any] = {
        "messages": _alias_reasoning_fields(messages),
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation_prompt,
    }
    try:
        return _compile(template).render(**tokens | variables)
    except TemplateSyntaxError as error:
        raise StageError(
            Failure.DATASET_INVALID,
            f"the chat template does not compile: line {error.lineno}: {error.message}; mend it, "
            "or give plain text",
        ) from None
    except (MemoryError, StageError):
        raise
    except Exception as error:  # a template can fail in any way that code can
        reason = str(error) or type(error).__name__
        raise StageError(
            Failure.DATASET_INVALID,
            f"the chat template refuses these messages: {reason}; change them to what it takes",
        ) from None


_bounded = BoundedCall(_render, "the chat template")


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    """Compile a template in transformers' environment, with our own clock in it."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    # That function makes an environment for each call; the cache that its name speaks of is the
    # caller's, whose templates keep the true clock.
    compiled = _cached_compile_jinja_template(template)
    compiled.environment.globals["strftime_now"] = TODAY.strftime
    compiled.environment.globals["lipsum"] = _refuse_chance
    compiled.environment.filters["random"] = _refuse_chance
    return compiled


def _refuse_chance(*_: Any, **__: Any) -> Any:
    """Refuse what Jinja draws anew for each rendering."""
    raise StageError(
        Failure.DATASET_INVALID,
        "the chat template draws by chance (random or lipsum), so that no prompt is made twice; "
        "mend it, or give plain text",
    )
