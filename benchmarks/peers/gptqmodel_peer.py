"""GPTQModel's GPTQ, in the environment that has it; benchmarks.quality calls it."""

import tempfile

import torch
from exchange import Job, logprobs
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig


def main() -> None:
    """Quantize the job's model, and evaluate what it stores."""
    job = Job()
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=True, desc_act=False)
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.calibration
    ]
    model = GPTQModel.load(str(job.model), config, device="cpu", dtype=torch.float32)
    with job.timed():
        model.quantize(rows, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        stored = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
        job.finish(logprobs(stored.model, job.evaluation))


if __name__ == "__main__":
    main()
