"""Train the demo tokenizer: byte-level BPE with every byte, digits apart, and a ChatML template.

python -m demo.tokenizer          # writes the tokenizer files of demo/model/
"""

import json
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.corpus import training_documents

MODEL = Path(__file__).parent / "model"
VOCABULARY_LIMIT = 1280
DOCUMENTS = 20_000
CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train() -> PreTrainedTokenizerFast:
    """Train the tokenizer on the first `DOCUMENTS` training documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_LIMIT,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(training_documents(), DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train the tokenizer and write its files."""
    tokenizer = train()
    tokenizer.save_pretrained(MODEL)
    path = MODEL / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The class name that every release of transformers, vLLM and llama.cpp's tools know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    print(f"wrote a vocabulary of {len(tokenizer)} to {MODEL}")


if __name__ == "__main__":
    main()
