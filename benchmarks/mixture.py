"""A mixture trained for a few minutes on the demo's world, and which of its experts are starved.

    python -m benchmarks.mixture /tmp/mixture                    # some four minutes on two cores
    python -m benchmarks.mixture /tmp/mixture --sequences 64     # the same model on more text

Nothing balances the router, so that it comes to favour some experts. The checkpoint goes through
every stage in a project of its own, once rounded and once not; the page is
`project-<sequences>/reports/compression.html` in the folder.
"""

import argparse
import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import trange
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.paths import DEMO_DATA, DEMO_MODEL, RESULTS, ROOT
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from demo.corpus import EVEN, training_documents
from quantline.config.compose import as_yaml, compose
from quantline.files import read_json, write_json
from quantline.paths import CALIBRATION, METRICS
from quantline.report.experts import describe_experts, modules_of_experts
from quantline.run.stage import stage_run

SEED = 7
STEPS = 400
WARMUP_STEPS = 40
SEQUENCES = 8  # of a step
LENGTH = 128
PEAK_RATE = 3e-3
CONTEXT = 256
TRAINING = "training.json"  # of the folder of a checkpoint
RECIPE = "gptq-w4g32"
VARIANTS = {"bf16": "none", RECIPE: RECIPE}  # variant → its recipe
OVERRIDES = (
    "suite=quick",
    f"recipe=[{','.join(VARIANTS.values())}]",
    f"variant=[{','.join(VARIANTS)}]",
    # transformers and vLLM take no zero points in the experts of a mixture.
    f"recipes.{RECIPE}.symmetric=true",
    "target=any",
    "target.gates=[{metric: experts_starved, operator: '<=', threshold: 0}]",
    "model=local",
    "calibration=file",
    f"calibration.path={ROOT / DEMO_DATA / 'calibration.txt'}",
    "calibration.part=[0.0,1.0]",
    f"calibration.length={LENGTH}",
    "calibration.curvature=false",
    "evaluation=file",
    f"evaluation.path={ROOT / DEMO_DATA / 'evaluation.txt'}",
    "evaluation.part=[0.0,1.0]",
    "evaluation.sequences=64",
    f"evaluation.length={LENGTH}",
    "evaluation.gold=null",
    "evaluation.speed.prompt_tokens=32",
    "evaluation.speed.new_tokens=16",
    "evaluation.speed.repetitions=3",
)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return a mixture of two million parameters, each token to 1 of 8 experts in 4 blocks."""
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=1,
        norm_topk_prob=False,  # weights of 1 would leave the router without gradients
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3MoeForCausalLM(config)


def train(tokenizer: PreTrainedTokenizerFast, steps: int) -> tuple[Qwen3MoeForCausalLM, float]:
    """Train a mixture from nothing; return it with the loss of its last step."""
    model = make_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, weight_decay=0.05, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, steps, pct_start=WARMUP_STEPS / STEPS
    )
    documents = training_documents(EVEN, SEED)
    needed = SEQUENCES * LENGTH
    stream: list[int] = []
    last = 0.0
    progress = trange(steps, desc="training")
    for step in progress:
        while len(stream) < needed:
            stream += tokenizer.encode(next(documents), add_special_tokens=False)
            stream.append(tokenizer.eos_token_id)
        tokens = torch.tensor(stream[:needed]).view(SEQUENCES, LENGTH)
        stream = stream[needed:]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        last = loss.item()
        if step % 20 == 19:
            progress.set_postfix(loss=f"{last:.3f}")
    return model, last


def write_checkpoint(folder: Path, steps: int) -> dict[str, Any]:
    """Train the mixture into a folder; return what there is to say of the training."""
    if (folder / TRAINING).is_file():
        return read_json(folder / TRAINING)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / DEMO_MODEL)
    with stopwatch() as times:
        model, loss = train(tokenizer, steps)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training = {"parameters": parameters, "steps": steps, "loss": loss, **times}
    write_json(folder / TRAINING, training)
    return training


def run_stages() -> None:
    """Take the checkpoint in the working folder through every stage."""
    stages: list[tuple[str, str | None]] = [
        (stage, None) for stage in ("load", "answer", "calibrate", "reference")
    ]
    stages += [("quantize", recipe) for recipe in VARIANTS.values()]
    for stage in ("export", "evaluate"):
        stages += [(stage, variant) for variant in VARIANTS]
    stages.append(("compare", None))
    for stage, instance in stages:
        module = importlib.import_module(f"stages.{stage}")
        with stage_run(stage, instance) as run:
            getattr(module, stage)(run)


def experts_table(experts: list[dict[str, Any]]) -> Table:
    """Return the table of the page for the terminal."""
    titles = ("block", "experts", "fewest", "median", "most", "starved")
    rows = []
    for line in modules_of_experts(experts):
        numbers = (line.block, line.experts, line.fewest, line.median, line.most)
        rows.append([*(f"{number:,.0f}" for number in numbers), line.names or "–"])
    return number_table(titles, rows)


def main() -> None:
    """Train, run every stage, and say which experts are starved."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a model that is there is not trained again")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sequences", type=int, default=16, help="of the calibration text")
    options = parser.parse_args()
    folder = options.folder.absolute()
    project = folder / f"project-{options.sequences}"
    project.mkdir(parents=True)
    training = write_checkpoint(folder / "model", options.steps)
    shutil.copytree(ROOT / "conf", project / "conf")
    shutil.copy(ROOT / "dvc.yaml", project)
    own = (f"model.path={folder / 'model'}", f"calibration.sequences={options.sequences}")
    (project / "params.yaml").write_text(as_yaml(compose((*OVERRIDES, *own), root=project)))
    os.chdir(project)
    run_stages()
    experts = read_json(CALIBRATION / "calibration.json")["experts"]
    measured = {variant: read_json(METRICS / f"{variant}.json") for variant in VARIANTS}
    console = Console(width=120)
    console.print(experts_table(experts))
    console.print(describe_experts(experts))
    for variant, figures in measured.items():
        console.print(f"{variant}: KL divergence {figures['mean_kld']:.5f}", highlight=False)
    keys = ("mean_kld", "mean_kld_se", "perplexity", "experts_starved", "expert_tokens_min")
    shown = {
        variant: {key: figures[key] for key in keys if key in figures}
        for variant, figures in measured.items()
    }
    results = {
        "training": training,
        "calibration_tokens": options.sequences * LENGTH,
        "experts": experts,
        "variants": shown,
    }
    write_json(RESULTS / f"mixture-{options.sequences}.json", results)


if __name__ == "__main__":
    main()
