"""Llamas of random weights, for what depends on the sizes of a model alone."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.paths import ROOT
from quantline.files import write_json
from quantline.model.safetensors_writer import SafetensorsWriter

# The model whose memory is measured: 49 MiB of float32 weights in a block.
NARROW: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
# The model that is converted to GGUF: 86 MiB of bfloat16 weights in a block.
WIDE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# The model that is loaded: of SmolLM2-135M's sizes.
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# The model with a large vocabulary.
SHALLOW: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WEIGHT_SPREAD = 0.02  # standard deviation of the weights
CHANNEL_SPREAD = 0.5  # standard deviation of the logarithm of the channels' sizes


def block_mib(config: dict[str, Any]) -> float:
    """Return the MiB of one block's float32 weights, where keys are as wide as queries."""
    hidden = config["hidden_size"]
    inner = config["intermediate_size"]
    return 4 * (4 * hidden**2 + 3 * hidden * inner) / 2**20


def write_narrow_llama(folder: Path, blocks: int) -> None:
    """Write the model whose memory is measured, tensor by tensor, without a tokenizer.

    Args:
        folder: It is made.
        blocks: How many decoder blocks.
    """
    _write_llama(folder, NARROW | {"num_hidden_layers": blocks})


def write_small_llama(folder: Path, blocks: int) -> None:
    """Write the model that is loaded, with the demo's tokenizer, which has its first tokens.

    Args:
        folder: It is made.
        blocks: How many decoder blocks.
    """
    _write_llama(folder, SMALL | {"num_hidden_layers": blocks}, left_out=("lm_head.weight",))
    _copy_tokenizer(folder)


def _write_llama(folder: Path, config: dict[str, Any], left_out: tuple[str, ...] = ()) -> None:
    """Write a model of random weights, without a tokenizer, and without some tensors."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir()
    write_json(folder / "config.json", config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    draw = np.random.default_rng(0)
    names = sorted(set(shapes) - set(left_out))
    with SafetensorsWriter(folder / "model.safetensors", names) as writer:
        for name in names:
            writer.add(name, _draw_tensor(draw, shapes[name]).astype(ml_dtypes.bfloat16))


def write_wide_llama(folder: Path, blocks: int) -> None:
    """Write the model that is converted to GGUF, tensor by tensor, with the demo's tokenizer.

    Its weights have a few large channels, as trained ones have them.

    Args:
        folder: It is made.
        blocks: How many decoder blocks.
    """
    folder.mkdir(parents=True)
    _copy_tokenizer(folder, "chat_template.jinja")
    write_json(folder / "config.json", WIDE | {"num_hidden_layers": blocks})
    shapes = _wide_shapes(blocks)
    draw = np.random.default_rng(0)
    names = [f"{name}.weight" for name in shapes]
    with SafetensorsWriter(folder / "model.safetensors", names) as writer:
        for name, shape in shapes.items():
            tensor = _draw_tensor(draw, shape)
            channels = np.exp(CHANNEL_SPREAD * draw.standard_normal(shape[-1:], np.float32))
            writer.add(f"{name}.weight", (tensor * channels).astype(ml_dtypes.bfloat16))


def _wide_shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return module → shape of its weight."""
    width = WIDE["hidden_size"]
    inner = WIDE["intermediate_size"]
    keys = width // 4
    parts = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (WIDE["vocab_size"], width),
        "lm_head": (WIDE["vocab_size"], width),
        "model.norm": (width,),
    }
    for block in range(blocks):
        for part, shape in parts.items():
            shapes[f"model.layers.{block}.{part}"] = shape
    return shapes


def write_shallow_llama(folder: Path, vocabulary: int) -> None:
    """Write a model with a large vocabulary, of which the demo's tokenizer has the first tokens.

    Args:
        folder: It is made.
        vocabulary: How many tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    _copy_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        **SHALLOW,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def _copy_tokenizer(folder: Path, *more: str) -> None:
    """Copy the demo's tokenizer into a folder."""
    for name in ("tokenizer.json", "tokenizer_config.json", *more):
        shutil.copy(ROOT / "demo/model" / name, folder)


def _draw_tensor(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a random matrix float32, or the ones of a norm."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return draw.standard_normal(shape, np.float32) * WEIGHT_SPREAD
