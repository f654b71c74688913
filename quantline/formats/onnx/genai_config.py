"""genai_config.json: what onnxruntime-genai has to know of a graph that it serves.

Its keys: https://onnxruntime.ai/docs/genai/reference/config.html
"""

import re
from typing import TYPE_CHECKING, Any

from quantline.errors import Failure, StageError
from quantline.formats.onnx.rope import longest
from quantline.model.tensor_source import TensorSource
from quantline.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import onnx

RUNTIME = "onnxruntime-genai"
FILE = "genai_config.json"
NO_TOKEN = -1
TOKEN_INPUTS = ("input_ids", "attention_mask", "position_ids")


def make_config(source: TensorSource, graph: "onnx.ModelProto", file: str) -> dict[str, Any]:
    """Return its content.

    Args:
        source: The unquantized model.
        graph: Its graph, as quantline/formats/onnx/graph.py makes it.
        file: Where the graph lies.

    Raises:
        StageError: missing_tokenizer, if no token ends a text; unsupported_architecture, for a
            model that carries something else than keys and values of one size.
    """
    layers, heads, width = _cache_sizes(graph)
    inputs = {value.name for value in graph.graph.input}
    arch = source.arch
    tokenizer = Tokenizer(source.folder)
    end_tokens = tokenizer.end_tokens
    if not end_tokens:
        raise StageError(
            Failure.MISSING_TOKENIZER,
            "expected a token that ends a text, found none in tokenizer_config.json and "
            "generation_config.json; onnxruntime-genai needs one, take runtime onnxruntime",
        )
    begin_token = tokenizer.special("bos_token")
    padding = tokenizer.special("pad_token")
    # Where a sequence begins or ends with this token, the library leaves it out, so it may be none
    # that texts hold.
    if padding is None or padding in (begin_token, *end_tokens):
        padding = NO_TOKEN
    return {
        "model": {
            "type": "decoder",  # any model that predicts the next token with a key-value cache
            "vocab_size": arch.vocab_size,
            "context_length": longest(arch),
            "bos_token_id": end_tokens[0] if begin_token is None else begin_token,
            "eos_token_id": end_tokens,
            "pad_token_id": padding,
            "decoder": {
                "filename": file,
                "session_options": {},
                "hidden_size": arch.hidden_size,
                "head_size": width,
                "num_attention_heads": arch.heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                "inputs": {
                    **{name: name for name in TOKEN_INPUTS if name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The graph puts new keys and values behind those it is given, so the two cannot share a
        # buffer.
        "search": {
            "do_sample": False,
            "max_length": longest(arch),
            "past_present_share_buffer": False,
        },
    }


def _cache_sizes(graph: "onnx.ModelProto") -> tuple[int, int, int]:
    """Return the number of layers with keys and values, and their heads and width."""
    numbers = set()
    sizes = set()
    others = []
    for value in graph.graph.input:
        found = re.fullmatch(r"past_key_values\.(\d+)\.(key|value)", value.name)
        if found:
            numbers.add(int(found[1]))
            dims = value.type.tensor_type.shape.dim
            sizes.add((dims[1].dim_value, dims[3].dim_value))
        elif value.name not in TOKEN_INPUTS:
            others.append(value.name)
    if others or len(sizes) != 1 or numbers != set(range(len(numbers))):
        states = ", ".join(others[:3]) or f"sizes {sorted(sizes)} in layers {sorted(numbers)}"
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected keys and values of one size in every layer for onnxruntime-genai, found "
            f"{states}; take runtime onnxruntime",
        )
    return len(numbers), *sizes.pop()
