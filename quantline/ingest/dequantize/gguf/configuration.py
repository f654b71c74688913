"""config.json of the model in a GGUF file.

transformers' own reading decides the class. It passes over many keys, and then the defaults of one
published model would stand there; so every key of the architecture is looked at here.
"""

from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.ingest.dequantize.gguf.file import GgufFile
from quantline.ingest.dequantize.gguf.rope import READ as OF_ROPE
from quantline.ingest.dequantize.gguf.rope import rope_parameters

# Suffix of a key → the attribute of a configuration.
ATTRIBUTES = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.time_step_rank": "time_step_rank",
    "ssm.inner_size": "intermediate_size",
}
# The same, where classes have other names for it; the first that a class has counts.
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
SEVERAL = {
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.layer_norm_rms_epsilon": EPSILONS,
    "attention.layer_norm_epsilon": EPSILONS,
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
}
# Keys that are read where they are needed, or say nothing about what is computed.
ELSEWHERE = frozenset(
    {
        *("attention.key_length", "attention.value_length", "attention.sliding_window_pattern"),
        *(
            "vocab_size",
            "context_length",
            "attention.causal",
            "use_parallel_residual",
            "tensor_data_layout",
        ),
        *("attention.key_length_swa", "attention.value_length_swa"),
    }
)
NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, "", [])
# llama.cpp scales the attention of Gemma's largest models by another width than that of a head
# (src/models/gemma2.cpp, gemma3.cpp): how many layers these have.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def configuration_of(file: GgufFile) -> Any:
    """Return the configuration of a file's model, as transformers' class.

    Raises:
        StageError: unsupported_architecture, for an architecture that transformers does not read,
            and for a key that says what is not understood.
    """
    from transformers import AutoConfig
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # transformers raises what comes up, for unknown files and damaged
        raise_if_of_machine(error)
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise file.refusal(
            "an architecture that transformers reads from GGUF", f"{file.architecture} ({words})"
        ) from None
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise file.refusal("a causal language model", config.model_type)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.vocab_size = file.shape("token_embd.weight")[0]
    # For these transformers reads every key that the architecture has.
    if file.architecture not in GGUF_CONFIG_ARCHS:
        _complete(config, file)
    config.dtype = file.dtype
    config.name_or_path = ""
    return config


def _complete(config: Any, file: GgufFile) -> None:
    """Set what the file says, whether or not transformers has read it."""
    for suffix, value in file.settings.items():
        if suffix in ELSEWHERE or suffix in OF_ROPE or value in NEUTRAL:
            continue
        names = SEVERAL.get(suffix, (ATTRIBUTES.get(suffix),))
        known = [name for name in names if name and hasattr(config, name)]
        if not known and value == _usual(suffix, file):
            continue
        if not known or isinstance(value, list):
            raise file.refusal(
                f"settings that a {config.model_type} of transformers has",
                f"{file.architecture}.{suffix} = {value!r:.80}",
            )
        _set(config, known[0], value, file)
    length = file.setting("context_length")
    if length and hasattr(config, "max_position_embeddings"):
        config.max_position_embeddings = length
    _set_heads(config, file)
    _set_windows(config, file)
    _set_biases(config, file)
    _set_attention_scale(config, file)
    if getattr(config, "rope_parameters", None) is not None:
        windowed = "sliding_attention" in config.rope_parameters
        config.rope_parameters = rope_parameters(file, head_dim(config, file), windowed)
        full = config.rope_parameters.get("full_attention", config.rope_parameters)
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            if hasattr(config, key):
                default = getattr(config, key) if key.startswith("original") else 1.0
                setattr(config, key, full.get(key, default))
    if file.setting("attention.causal") is False:
        raise file.refusal("a causal language model", "attention that sees what follows")


def _usual(suffix: str, file: GgufFile) -> Any:
    """Return what a class means that has no attribute for a key."""
    if suffix == "attention.head_count_kv":
        return file.setting("attention.head_count")
    return 4 * file.setting("embedding_length") if suffix == "feed_forward_length" else None


def _set(config: Any, name: str, value: Any, file: GgufFile) -> None:
    """Set an attribute; one that follows from others has to have the value."""
    try:
        setattr(config, name, value)
    except AttributeError:
        if getattr(config, name) != value:
            raise file.refusal(f"{name} {getattr(config, name)}", repr(value)) from None


def head_dim(config: Any, file: GgufFile) -> int:
    """Return the width of a head, by llama.cpp's default where the file does not say."""
    stated = file.setting("attention.key_length")
    return int(stated or config.hidden_size // config.num_attention_heads)


def _set_heads(config: Any, file: GgufFile) -> None:
    """Set the width of a head, which keys and values have to share."""
    if not getattr(config, "num_attention_heads", None):
        return
    width = head_dim(config, file)
    if hasattr(config, "head_dim"):
        _set(config, "head_dim", width, file)
    elif width * config.num_attention_heads != config.hidden_size:
        raise file.refusal("heads that divide the hidden size", f"a width of {width}")
    for key in ("attention.value_length", "attention.key_length_swa"):
        if (file.setting(key) or width) != width:
            raise file.refusal(f"{key} {width}, as of keys", file.setting(key))


def _set_windows(config: Any, file: GgufFile) -> None:
    """Set which layers have a window."""
    pattern = file.setting("attention.sliding_window_pattern")
    if pattern is None or not hasattr(config, "layer_types"):
        return
    if not isinstance(pattern, list):
        count = config.num_hidden_layers
        pattern = [bool((layer + 1) % int(pattern)) for layer in range(count)]
    kinds = {True: "sliding_attention", False: "full_attention"}
    config.layer_types = [kinds[bool(is_windowed)] for is_windowed in pattern]


def _set_biases(config: Any, file: GgufFile) -> None:
    """Set which layers have biases, which only the tensors say."""
    found = {
        "attention_bias": "blk.0.attn_q.bias",
        "mlp_bias": "blk.0.ffn_up.bias",
        "use_bias": "blk.0.attn_q.bias",
    }
    for attribute, name in found.items():
        if hasattr(config, attribute):
            setattr(config, attribute, name in file.tensors)


def _set_attention_scale(config: Any, file: GgufFile) -> None:
    """Set Gemma's own scale of attention, which files leave to llama.cpp."""
    if not hasattr(config, "query_pre_attn_scalar"):
        return
    largest = config.num_hidden_layers == GEMMA_27B.get(file.architecture)
    width = config.hidden_size // config.num_attention_heads if largest else head_dim(config, file)
    config.query_pre_attn_scalar = width
