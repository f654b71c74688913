"""llm-compressor's GPTQ (static act-order) or AWQ, in the environment that has it.

benchmarks.quality calls it.
"""

from typing import Any

import torch
from datasets import Dataset
from exchange import Job, logprobs
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines import cache
from transformers import AutoModelForCausalLM

IGNORED = ["lm_head"]


def recipe_of(job: Job) -> Any:
    """Return llm-compressor's modifiers for the job's method and grid."""
    weights = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": job.group_size,
    }
    if job.method == "awq":
        groups = {"all": {"targets": ["Linear"], "weights": weights}}
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=IGNORED)]
    weights["actorder"] = "static"
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    return GPTQModifier(config_groups=groups, ignore=IGNORED)


def main() -> None:
    """Quantize and evaluate the job's model."""
    job = Job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    count, length = job.calibration.shape
    rows = Dataset.from_dict(
        {"input_ids": job.calibration.tolist(), "attention_mask": [[1] * length] * count}
    )
    if job.method == "awq":
        # There is no GPU that memory would be pinned for.
        cache.IntermediatesCache.pin_memory = lambda self, batch: None
    recipe = recipe_of(job)
    with job.timed():
        oneshot(
            model=model,
            dataset=rows,
            recipe=recipe,
            num_calibration_samples=count,
            max_seq_length=length,
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )
    job.finish(logprobs(model, job.evaluation))


if __name__ == "__main__":
    main()
