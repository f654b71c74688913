"""Train the demo model from nothing and write it as an ordinary Hugging Face folder.

    python -m demo.train              # some 35 minutes on two cores; writes demo/model/

The schedule counts steps and the generators are seeded: the recipe is in the constants below. The
weights are stored in bfloat16, and the gold accuracy that is printed belongs to those stored
weights.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import DATA, EVEN, READING, render, training_documents
from demo.tokenizer import CONTEXT, MODEL, TURN_END

SEED = 0
SEQUENCES = 8  # of a step, which sees 2,048 tokens
LENGTH = 256
STEPS = 3400
READING_STEPS = 800  # finding things in a text comes first: facts leave no gradient for it
WARMUP_STEPS = 100
PEAK_RATE = 3e-3
WEIGHT_DECAY = 0.05
GRADIENT_LIMIT = 1.0  # norm to which gradients are clipped
REPORT_EVERY = 200
CHANNEL_SPREAD = 0.8  # standard deviation of the channels' sizes, in powers of two
ITEMS_AT_ONCE = 32


class Batch(NamedTuple):
    """The tokens of one step.

    Attributes:
        tokens: [SEQUENCES, LENGTH].
        visible: Which tokens each may look at, bool [SEQUENCES, 1, LENGTH, LENGTH].
    """

    tokens: torch.Tensor
    visible: torch.Tensor


def learning_rate(step: int) -> float:
    """Return the rate of a step.

    It warms up linearly to its peak, which holds while reading is learned, and then follows a
    cosine that ends at zero.
    """
    if step < READING_STEPS:
        return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS)
    progress = (step - READING_STEPS) / (STEPS - READING_STEPS)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama with random weights.

    Its widths are multiples of 256, so that every row is whole blocks of a k-quant.
    """
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return token ids without special tokens around the text."""
    return tokenizer.encode(text, add_special_tokens=False)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[Batch]:
    """Yield the packed training tokens of every step.

    Documents end in the end-of-text token. While reading is learned, a token looks at its own
    document alone: what is asked for must be found in the text, and not by chance in a neighbour.
    Later half of the rows see all that precedes.
    """
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    documents = training_documents(READING, SEED + 1)
    stream: list[int] = []
    needed = SEQUENCES * LENGTH
    for step in range(STEPS):
        if step == READING_STEPS:
            documents = training_documents(EVEN, SEED + 2)
        while len(stream) < needed:
            stream += encode(tokenizer, next(documents))
            stream.append(tokenizer.eos_token_id)
        tokens = torch.tensor(stream[:needed]).view(SEQUENCES, LENGTH)
        stream = stream[needed:]
        ends = (tokens == tokenizer.eos_token_id).long()
        document_number = ends.cumsum(1) - ends
        visible = document_number[:, :, None] == document_number[:, None, :]
        if step >= READING_STEPS:
            visible[::2] = True
        yield Batch(tokens, (visible & causal)[:, None])


@torch.no_grad()
def gold_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the share of each task's items whose answer greedy decoding gives after the prompt."""
    lines = (DATA / "gold.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    correct: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(items), ITEMS_AT_ONCE):
        batch = items[start : start + ITEMS_AT_ONCE]
        answered = answer_correctly(model, tokenizer, batch)
        for item, is_correct in zip(batch, answered, strict=True):
            correct[item["task"]].append(is_correct)
    return {task: sum(answers) / len(answers) for task, answers in sorted(correct.items())}


def answer_correctly(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, Any]]
) -> list[bool]:
    """Return for each item whether every token of its answer is the most probable one."""
    prompts = []
    answers = []
    for item in items:
        text = item["prompt"]
        if "messages" in item:
            text = render(item["messages"], generation_prompt=True)
        prompts.append(encode(tokenizer, text))
        answers.append(encode(tokenizer, item["answer"]))
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), tokenizer.eos_token_id)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
    best = model(input_ids=tokens).logits.argmax(-1)
    correct = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        predicted = best[number, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        correct.append(predicted.tolist() == answer)
    return correct


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the model in bfloat16; the end of a chat turn is among the tokens that end a text."""
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(MODEL)
    (MODEL / "model.safetensors").chmod(0o644)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for the embedding and the norms.

    Muon finds the copying of a word from earlier text in a fraction of the steps that AdamW needs.
    """
    matrices = []
    others = []
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            matrices.append(weight)
        else:
            others.append(weight)
    return [
        torch.optim.Muon(matrices, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train in place; every `REPORT_EVERY` steps the model is saved and its accuracy printed."""
    optimizers = make_optimizers(model)
    started = time.perf_counter()
    losses: list[float] = []
    for step, batch in enumerate(batches(tokenizer)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                input_ids=batch.tokens, labels=batch.tokens, attention_mask=batch.visible
            )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_LIMIT)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(output.loss.item())
        if (step + 1) % REPORT_EVERY == 0:
            save(model, tokenizer)
            loss = sum(losses) / len(losses)
            report(step + 1, loss, tokenizer, time.perf_counter() - started)
            losses.clear()


def report(step: int, loss: float, tokenizer: PreTrainedTokenizerFast, seconds: float) -> None:
    """Print the loss, and the gold accuracy of the stored model."""
    stored = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    accuracy = gold_accuracy(stored, tokenizer)
    tasks = "  ".join(f"{task} {share:.3f}" for task, share in accuracy.items())
    print(f"step {step}  loss {loss:.4f}  {tasks}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def spread_channels(model: LlamaForCausalLM) -> None:
    """Make channels as unlike in size as those of large models, in place.

    A model as small as this one grows no outliers (Dettmers et al. 2022, section 4), and without
    them rounding has hardly anything to lose. What a norm or an up projection puts out is scaled by
    powers of two, and the weights that read it by their inverses: the function stays the same to
    the bit.
    """
    draw = torch.Generator().manual_seed(SEED)

    def draw_sizes(count: int) -> torch.Tensor:
        return 2.0 ** (CHANNEL_SPREAD * torch.randn(count, generator=draw)).round()

    for block in model.model.layers:
        attention = block.self_attn
        mlp = block.mlp
        readers_of_norms = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, readers in readers_of_norms.items():
            sizes = draw_sizes(len(norm.weight))
            norm.weight.mul_(sizes)
            for reader in readers:
                reader.weight.div_(sizes)
        sizes = draw_sizes(len(mlp.up_proj.weight))
        mlp.up_proj.weight.mul_(sizes[:, None])
        mlp.down_proj.weight.div_(sizes)


def main() -> None:
    """Train the model and write it."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    model = make_model(tokenizer)
    train(model, tokenizer)
    spread_channels(model)
    save(model, tokenizer)


if __name__ == "__main__":
    main()
