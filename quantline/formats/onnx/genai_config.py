"""genai_config.json: what onnxruntime-genai has to be told of a graph that it serves.

Its keys: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from typing import Any

from quantline.model.architecture import architecture
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.errors import Failure, StageError

FILE = "genai_config.json"
NO_TOKEN = -1


def config(model: Checkpoint, graph: str) -> dict[str, Any]:
    """Its content for the graph of quantline/formats/onnx/graph.py in the file `graph`.

    Raises StageError(missing_tokenizer) if no token ends a text.
    """
    facts, tokenizer = architecture(model), Tokenizer(model.folder)
    ends = tokenizer.ends
    if not ends:
        raise StageError(Failure.MISSING_TOKENIZER, "expected a token that ends a text, found none in tokenizer_config.json "
                         "and generation_config.json; onnxruntime-genai needs one, take runtime onnxruntime")
    beginning, padding = tokenizer.special("bos_token"), tokenizer.special("pad_token")
    # Wherever a sequence begins or ends with this token it is not looked at, so it may be none that texts hold.
    padding = NO_TOKEN if padding in (None, beginning, *ends) else padding
    return {
        "model": {
            "type": "decoder",  # any model that predicts the next token with a KV cache
            "vocab_size": facts.vocab_size, "context_length": facts.max_positions,
            "bos_token_id": beginning if beginning is not None else ends[0], "eos_token_id": ends,
            "pad_token_id": padding,
            "decoder": {
                "filename": graph, "session_options": {}, "hidden_size": facts.hidden_size, "head_size": facts.head_dim,
                "num_attention_heads": facts.heads, "num_key_value_heads": facts.kv_heads,
                "num_hidden_layers": facts.layers,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids",
                           "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                            "present_value_names": "present.%d.value"},
            },
        },
        # The graph puts new keys and values behind those it is given, so the two cannot share a buffer.
        "search": {"do_sample": False, "max_length": facts.max_positions, "past_present_share_buffer": False},
    }
