"""Tiny random models with real tokenizers, and texts for them."""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

from quantline.text.special_tokens import SpecialTokens, write_special_tokens

# How families call sizes that they name otherwise, or None for those that they do not have.
OWN_NAMES: dict[str, dict[str, str | None]] = {
    "gpt2": {"intermediate_size": "n_inner", "num_key_value_heads": None, "head_dim": None},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "ada", "hugo", "rosa", "nico", "met", "the", "by", "a", "forest", "river", "old",
    "letter", "found", "called", "snow", "rain", "cheese", "bread", "boat", "early", "late",
    "morning", "evening", "walked", "ran", "saw", "looked", "at", "and", "then", "they",
    "shared", "some", "of", "it", "with", "us", "12", "47", "305", "is", "was",
]  # fmt: skip


def sentences(seed: int, documents: int) -> list[str]:
    """Return documents of random words, none of which another seed gives."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) for _ in range(40)) + f" {seed}-{index}."
        for index in range(documents)
    ]


def write_tokenizer(folder: Path) -> int:
    """Write a byte-level BPE tokenizer with split digits and a chat template; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(0, 60), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer.get_vocab_size()


def write_model(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    max_shard_size: str = "1GB",
    **sizes: Any,
) -> Path:
    """Write a random model and return its folder.

    Its channels are unlike each other, so that methods that look at the inputs see something.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    sizes = defaults | sizes
    dtype = sizes.pop("dtype", torch.bfloat16)
    sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    for usual, own in OWN_NAMES.get(model_type, {}).items():
        value = sizes.pop(usual)
        if own:
            sizes[own] = value
    config = AutoConfig.for_model(
        model_type,
        vocab_size=write_tokenizer(folder),
        max_position_embeddings=256,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    # transformers draws the weights from the global generator; fork it to disturb nothing else.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms and biases
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def place_model(source: Path, folder: Path) -> None:
    """Copy a model to where `load` brings it, with the special tokens that `load` writes down.

    Without them every process that opens the tokenizer imports transformers, to ask it.
    """
    shutil.copytree(source, folder)
    write_special_tokens(folder, _special_tokens(source))


@functools.cache
def _special_tokens(folder: Path) -> SpecialTokens:
    from quantline.text.transformers_tokenizer import ask

    return ask(folder).special


def transformers_model(folder: Path) -> Any:
    """Return the model of a folder as transformers loads it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
