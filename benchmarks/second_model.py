"""A second model to measure on, unlike the demo: a Qwen3 trained on the source text of Python's own standard library.

    python -m benchmarks.second_model /tmp/second          # some ten minutes on two cores
    python -m benchmarks.quality --model /tmp/second/model --calibration /tmp/second/calibration.txt \
        --evaluation /tmp/second/evaluation.txt

Every twentieth module of the library is held out: half of those for calibration, half for evaluation.
"""

import argparse
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED, VOCABULARY, CONTEXT = 0, 1024, 512
STEPS, SEQUENCES, LENGTH = 600, 8, 256
TRAINED_ON = 400  # modules
WARMUP, PEAK = 60, 3e-3
HELD_OUT = 20


def texts() -> tuple[list[str], list[str], list[str]]:
    """(training, calibration, evaluation): modules of the standard library without its tests, shuffled, one text each."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in library.rglob("*.py")
                   if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts))
    random.Random(SEED).shuffle(paths)
    found = [text for path in paths if len(text := path.read_text(encoding="utf-8", errors="replace")) > 2000]
    held = found[::HELD_OUT]
    return [text for number, text in enumerate(found) if number % HELD_OUT][:TRAINED_ON], held[::2], held[1::2]


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   pad_token="<|endoftext|>", model_max_length=CONTEXT)


def train(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Qwen3ForCausalLM:
    """A Qwen3 of four million parameters, trained from nothing."""
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    encoded = tokenizer.backend_tokenizer.encode_batch(documents)
    stream = torch.tensor([token for one in encoded for token in [*one.ids, tokenizer.eos_token_id]])
    draw = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, STEPS, pct_start=WARMUP / STEPS)
    progress = trange(STEPS, desc="training")
    for step in progress:
        starts = torch.randint(0, len(stream) - LENGTH, (SEQUENCES,), generator=draw)
        tokens = torch.stack([stream[start:start + LENGTH] for start in starts])
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    training, *held = texts()
    for name, documents in zip(("calibration", "evaluation"), held, strict=True):
        (folder / f"{name}.txt").write_text("\n\n".join(documents), encoding="utf-8")
    tokenizer = make_tokenizer(training)
    model = train(tokenizer, training).to(torch.bfloat16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
