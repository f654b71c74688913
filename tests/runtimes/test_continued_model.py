"""Models go on from what they keep, or read everything again; the logits are those of the whole."""

import pytest
import torch

from benchmarks.models.tiny_config import tiny_config
from quantline.runtimes.continued_model import ContinuedModel


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [
        ("llama", "past_key_values"),
        ("mamba2", "cache_params"),
        ("openai-gpt", None),
    ],
)
def test_run_gives_the_logits_of_the_whole_text(model_type, kept):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, 64, None)).eval()
    tokens = torch.randint(64, (2, 9))
    continued = ContinuedModel(model)
    read = None
    parts = []
    with torch.inference_mode():
        whole = model(input_ids=tokens).logits
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            if kept and end - start > 1 and start:  # states take one token at a time
                steps = [(number, number + 1) for number in range(start, end)]
            else:
                steps = [(start, end)]
            for first, last in steps:
                logits, read = continued.run(tokens[:, first:last], read)
                parts.append(logits)
        last_alone, _ = continued.run(tokens, None, logits_to_keep=1)
    assert set(read.kept) == ({kept} if kept else set())
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(last_alone[:, -1], whole[:, -1], atol=2e-4, rtol=2e-4)
