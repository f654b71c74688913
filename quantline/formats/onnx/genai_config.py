"""genai_config.json: what onnxruntime-genai has to know of a graph that it serves.

Its keys: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from typing import Any

from quantline.errors import Failure, StageError
from quantline.formats.onnx.rope import longest
from quantline.model.tensor_source import TensorSource
from quantline.text.tokenizer import Tokenizer

RUNTIME = "onnxruntime-genai"
FILE = "genai_config.json"
NO_TOKEN = -1


def make_config(source: TensorSource, graph: str) -> dict[str, Any]:
    """Return its content.

    Args:
        source: The unquantized model.
        graph: The file with its graph, as quantline/formats/onnx/graph.py makes it.

    Raises:
        StageError: missing_tokenizer, if no token ends a text.
    """
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
                "filename": graph,
                "session_options": {},
                "hidden_size": arch.hidden_size,
                "head_size": arch.head_dim,
                "num_attention_heads": arch.heads,
                "num_key_value_heads": arch.kv_heads,
                "num_hidden_layers": arch.layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
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
