"""AutoRound with 200 iterations, in the environment that has it; benchmarks.quality calls it.

The method signroundv2 is its experimental successor, for few bits (`enable_alg_ext`).
"""

import torch
from auto_round import AutoRound
from exchange import Job, logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantize and evaluate the job's model."""
    job = Job()
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    rows = torch.from_numpy(job.calibration).long()
    with job.timed():
        rounding = AutoRound(
            model,
            tokenizer,
            bits=job.bits,
            group_size=job.group_size,
            sym=False,
            iters=200,
            enable_alg_ext=job.method == "signroundv2",
            seqlen=rows.shape[1],
            nsamples=len(rows),
            batch_size=8,
            dataset=[row[None] for row in rows],
            device_map="cpu",
            seed=0,
        )
        quantized, _ = rounding.quantize()
    job.finish(logprobs(quantized, job.evaluation))


if __name__ == "__main__":
    main()
