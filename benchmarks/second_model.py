"""A second model to measure on, unlike the demo: a Qwen3 trained on Python's standard library.

    python -m benchmarks.second_model /tmp/second          # some ten minutes on two cores
    python -m benchmarks.quality --model /tmp/second/model \
        --calibration /tmp/second/calibration.txt --evaluation /tmp/second/evaluation.txt

Every twentieth module of the library is held out: half of those for calibration, half for
evaluation.
"""

import argparse
import random
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED = 0
VOCABULARY = 1024
CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"

STEPS = 600
WARMUP_STEPS = 60
SEQUENCES = 8  # of a step
LENGTH = 256
PEAK_RATE = 3e-3

SHORTEST = 2000  # characters of a module that counts
TRAINING_MODULES = 400
HELD_OUT = 20  # every so many modules, one is held out
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3"}


class Texts(NamedTuple):
    """Modules of the standard library, one text each."""

    training: list[str]
    calibration: list[str]
    evaluation: list[str]


def read_texts() -> Texts:
    """Read the modules of the standard library without its tests, shuffled."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(library).parts):
            paths.append(path)
    random.Random(SEED).shuffle(paths)
    modules = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) > SHORTEST:
            modules.append(text)
    held_out = modules[::HELD_OUT]
    training = [text for number, text in enumerate(modules) if number % HELD_OUT]
    return Texts(training[:TRAINING_MODULES], held_out[::2], held_out[1::2])


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a Qwen3 of four million parameters with random weights."""
    torch.manual_seed(SEED)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Return the tokens of documents one after another, each with the end-of-text token."""
    tokens: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(documents):
        tokens += encoded.ids
        tokens.append(tokenizer.eos_token_id)
    return torch.tensor(tokens)


def train(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Qwen3ForCausalLM:
    """Train a model from nothing on random pieces of documents."""
    model = make_model(tokenizer)
    stream = token_stream(tokenizer, documents)
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, weight_decay=0.05, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, STEPS, pct_start=WARMUP_STEPS / STEPS
    )
    progress = trange(STEPS, desc="training")
    for step in progress:
        starts = torch.randint(0, len(stream) - LENGTH, (SEQUENCES,), generator=draw)
        tokens = torch.stack([stream[start : start + LENGTH] for start in starts])
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model


def main() -> None:
    """Write the texts and the model into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="it is made")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    texts = read_texts()
    calibration = "\n\n".join(texts.calibration)
    evaluation = "\n\n".join(texts.evaluation)
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
    (folder / "evaluation.txt").write_text(evaluation, encoding="utf-8")
    tokenizer = train_tokenizer(texts.training)
    model = train(tokenizer, texts.training).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
