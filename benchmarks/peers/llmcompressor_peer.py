"""llm-compressor's GPTQ (static act-order) or AWQ, in the environment that has it. Called by benchmarks/quality.py."""

import torch
from datasets import Dataset
from exchange import Job, logprobs
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines import cache
from transformers import AutoModelForCausalLM


def main() -> None:
    job = Job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rows = Dataset.from_dict({"input_ids": job.calibration.tolist(),
                              "attention_mask": [[1] * job.calibration.shape[1]] * len(job.calibration)})
    weights = {"num_bits": job.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": job.group_size}
    if job.method == "awq":
        cache.IntermediatesCache.pin_memory = lambda self, batch: None  # there is no GPU to pin for
        recipe = [AWQModifier(), QuantizationModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}},
                                                      ignore=["lm_head"])]
    else:
        recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights | {"actorder": "static"}}},
                              ignore=["lm_head"])
    with job.timed():
        oneshot(model=model, dataset=rows, recipe=recipe, num_calibration_samples=len(job.calibration),
                max_seq_length=job.calibration.shape[1], shuffle_calibration_samples=False, pipeline="sequential")
    job.finish(logprobs(model, job.evaluation))


if __name__ == "__main__":
    main()
