"""What llm-compressor writes for a model, in the environment that has it.

tests/formats/safetensors/test_llmcompressor.py calls it with a file of jobs: `model`, `out`,
`method` (rtn or gptq), `weights` and `activations` (quantization arguments, or null), `ignore`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

SEQUENCES, LENGTH = 8, 64  # random tokens that GPTQ is calibrated on


def tokens(vocabulary: int) -> Dataset:
    """Return rows of random token ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (SEQUENCES, LENGTH), generator=generator)
    mask = [[1] * LENGTH] * SEQUENCES
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask})


def write(job: dict[str, Any]) -> None:
    """Quantize a model and save it."""
    config = transformers.AutoConfig.from_pretrained(job["model"])
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(job["model"], dtype=torch.bfloat16)
    linearize_moe(model)
    scheme = {"targets": ["Linear"], "weights": job["weights"]}
    if job["activations"]:
        scheme["input_activations"] = job["activations"]
    options: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": job["ignore"]}
    if job["method"] == "gptq":
        oneshot(
            model=model,
            dataset=tokens(config.get_text_config().vocab_size),
            recipe=GPTQModifier(**options),
            num_calibration_samples=SEQUENCES,
            max_seq_length=LENGTH,
            pipeline="basic",
        )
    else:
        oneshot(model=model, recipe=QuantizationModifier(**options), pipeline="datafree")
    model.save_pretrained(job["out"], save_compressed=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        write(one)
