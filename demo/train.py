"""Train the demo model from nothing and write it as an ordinary Hugging Face folder.

    python -m demo.train              # some 35 minutes on two cores; writes demo/model/

The schedule counts steps, the generators are seeded: the recipe is in the constants below. The weights are stored in
bfloat16, and the gold accuracy that is printed belongs to those stored weights.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import DATA, EVEN, READING, render, training_documents
from demo.tokenizer import CONTEXT, MODEL

SEED = 0
SEQUENCES, LENGTH = 8, 256  # a step sees 2,048 tokens
READING_STEPS, STEPS = 800, 3400  # finding things in a text comes first: facts leave no gradient for it
WARMUP, PEAK, WEIGHT_DECAY, CLIP = 100, 3e-3, 0.05, 1.0
REPORT_EVERY = 200
SPREAD = 0.8  # standard deviation of the channels' sizes, in powers of two


def rate(step: int) -> float:
    """A linear warm-up to `PEAK`, then a cosine that ends at zero; the peak holds while reading is learned."""
    if step < READING_STEPS:
        return PEAK * min(1.0, (step + 1) / WARMUP)
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - READING_STEPS) / (STEPS - READING_STEPS)))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama whose widths are multiples of 256, so that every k-quant row is whole."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Packed training tokens [SEQUENCES, LENGTH] and which tokens each may look at [SEQUENCES, 1, LENGTH, LENGTH].

    Documents end in the end-of-text token. While reading is learned, a token looks at its own document alone: what is
    asked for must be found in the text, and not by chance in a neighbour. Later half of the rows see all that precedes.
    """
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    documents = training_documents(READING, SEED + 1)
    stream: list[int] = []
    for step in range(STEPS):
        if step == READING_STEPS:
            documents = training_documents(EVEN, SEED + 2)
        while len(stream) < SEQUENCES * LENGTH:
            stream += tokenizer.encode(next(documents), add_special_tokens=False) + [tokenizer.eos_token_id]
        tokens = torch.tensor(stream[:SEQUENCES * LENGTH]).view(SEQUENCES, LENGTH)
        stream = stream[SEQUENCES * LENGTH:]
        ends = (tokens == tokenizer.eos_token_id).long()
        number = ends.cumsum(1) - ends
        visible = number[:, :, None] == number[:, None, :]
        if step >= READING_STEPS:
            visible[::2] = True
        yield tokens, (visible & causal)[:, None]


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


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in bfloat16, with its tokenizer's turn end among the tokens that stop generation."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    stored.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=stops,
                                                pad_token_id=tokenizer.pad_token_id)
    stored.save_pretrained(MODEL)
    (MODEL / "model.safetensors").chmod(0o644)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train in place; every `REPORT_EVERY` steps the model is saved and its gold accuracy printed."""
    inner = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    outer = [weight for name, weight in model.named_parameters() if weight.dim() == 1 or "embed" in name]
    # Muon finds the copying of a word from earlier text in a fraction of the steps that AdamW needs for it.
    optimizers = [torch.optim.Muon(inner, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(outer, weight_decay=0.0, betas=(0.9, 0.98))]
    started, recent = time.perf_counter(), []
    for step, (tokens, visible) in enumerate(batches(tokenizer)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, attention_mask=visible).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0:
            save(model, tokenizer)
            stored = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
            tasks = "  ".join(f"{task} {share:.3f}" for task, share in gold_accuracy(stored, tokenizer).items())
            print(f"step {step + 1}  loss {sum(recent) / len(recent):.4f}  {tasks}  "
                  f"{time.perf_counter() - started:.0f} s", flush=True)
            recent.clear()


@torch.no_grad()
def spread_channels(model: LlamaForCausalLM) -> None:
    """Make channels as unlike in size as those of large models (Dettmers et al. 2022, section 4), in place.

    A model as small as this one grows no outliers, and without them rounding has hardly anything to lose. What a norm or
    an up projection puts out is scaled by powers of two, and the weights that read it by their inverses: the function
    stays the same to the bit.
    """
    draw = torch.Generator().manual_seed(SEED)

    def sizes(count: int) -> torch.Tensor:
        return 2.0 ** (SPREAD * torch.randn(count, generator=draw)).round()

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in ((block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                              (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            scale = sizes(len(norm.weight))
            norm.weight.mul_(scale)
            for reader in readers:
                reader.weight.div_(scale)
        scale = sizes(len(mlp.up_proj.weight))
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)


def main() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = make_model(tokenizer)
    train(model, tokenizer)
    spread_channels(model)
    save(model, tokenizer)


if __name__ == "__main__":
    main()
