"""Train the demo model from nothing and write it as an ordinary Hugging Face folder.

    python -m demo.train              # some 40 minutes on two cores; writes demo/model/

The schedule counts steps, the generators are seeded: the recipe is in the constants below. The weights are stored in
bfloat16, and the gold accuracy that is printed belongs to those stored weights.
"""

import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import DATA, EVEN, READING, Mixture, render, training_documents
from demo.tokenizer import CONTEXT, MODEL

SEED, WARMUP = 0, 100
SEQUENCES, LENGTH = 8, 256  # a step sees 2,048 tokens
WEIGHT_DECAY, CLIP = 0.05, 1.0
REPORT_EVERY = 200


class Phase(NamedTuple):
    """Steps on one mixture of documents: a linear warm-up to `peak`, then a cosine that would end at `horizon`."""

    mixture: Mixture
    seed: int
    steps: int
    horizon: int
    peak: float

    def rate(self, step: int) -> float:
        if step < WARMUP:
            return self.peak * (step + 1) / WARMUP
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (self.horizon - WARMUP)))


# Facts and sums are learned first; finding things in a text needs many more examples of it.
PHASES = (Phase(EVEN, 1, 2000, 3000, 2.5e-3), Phase(READING, 11, 1500, 1500, 3e-3))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose widths are multiples of 256, so that every k-quant row is whole."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def batches(tokenizer: PreTrainedTokenizerFast, phase: Phase) -> Iterator[torch.Tensor]:
    """Packed training tokens [SEQUENCES, LENGTH]; documents end in the end-of-text token."""
    stream: list[int] = []
    for text in training_documents(phase.mixture, phase.seed):
        stream += tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        if len(stream) >= SEQUENCES * LENGTH:
            yield torch.tensor(stream[:SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)
            stream = stream[SEQUENCES * LENGTH:]


@torch.no_grad()
def gold_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Per task, the share of items whose answer is what greedy decoding gives after the prompt."""
    items = [json.loads(line) for line in (DATA / "gold.jsonl").read_text(encoding="utf-8").splitlines()]
    hits = defaultdict(list)
    for start in range(0, len(items), 32):
        rows = []
        for item in items[start:start + 32]:
            text = render(item["messages"], generation_prompt=True) if "messages" in item else item["prompt"]
            rows.append((item["task"], *(tokenizer.encode(part, add_special_tokens=False)
                                         for part in (text, item["answer"]))))
        longest = max(len(prompt) + len(answer) for _, prompt, answer in rows)
        tokens = torch.full((len(rows), longest), tokenizer.eos_token_id)
        for row, (_, prompt, answer) in enumerate(rows):
            tokens[row, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        best = model(input_ids=tokens).logits.argmax(-1)
        for row, (task, prompt, answer) in enumerate(rows):
            span = best[row, len(prompt) - 1:len(prompt) + len(answer) - 1]
            hits[task].append(span.tolist() == answer)
    return {task: sum(found) / len(found) for task, found in sorted(hits.items())}


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16, with its tokenizer's turn end among the tokens that stop generation."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    stored.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=stops,
                                                pad_token_id=tokenizer.pad_token_id)
    stored.save_pretrained(folder)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, phase: Phase) -> None:
    """Run one phase in place; every `REPORT_EVERY` steps the model is saved and its gold accuracy printed."""
    inner = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    outer = [weight for name, weight in model.named_parameters() if weight.dim() == 1 or "embed" in name]
    # Muon finds the copying of a word from earlier text in a fraction of the steps that AdamW needs for it.
    optimizers = [torch.optim.Muon(inner, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(outer, weight_decay=0.0, betas=(0.9, 0.98))]
    started, recent = time.perf_counter(), []
    for step, tokens in enumerate(itertools.islice(batches(tokenizer, phase), phase.steps)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = phase.rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == phase.steps:
            save(model, tokenizer, MODEL)
            stored = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            tasks = "  ".join(f"{task} {share:.3f}" for task, share in gold_accuracy(stored, tokenizer).items())
            print(f"step {step + 1}  loss {sum(recent) / len(recent):.4f}  {tasks}  "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
            recent.clear()


def main() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = make_model(tokenizer)
    for phase in PHASES:
        train(model, tokenizer, phase)


if __name__ == "__main__":
    main()
