"""The unquantized model run one decoder block at a time, so that memory does not grow with its depth."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from stages.checkpoints.reader import Checkpoint

DECODER, EMBEDDING, NORM = "model", "model.embed_tokens", "model.norm"
BATCH_TOKENS = 4096


class _Recorder(nn.Module):
    """Stands in a block's place: passes the hidden states on and keeps what else the block is called with."""

    def __init__(self, block: nn.Module, calls: list[dict]) -> None:
        super().__init__()
        self.__dict__["block"], self.calls = block, calls

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.calls.append(kwargs)
        return hidden


def _fill(model: nn.Module, module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Give a module on the meta device its weights, in float32."""
    for name, _ in list(module.named_parameters()):
        value = torch.from_numpy(checkpoint.tensor(f"{prefix}.{name}"))
        set_module_tensor_to_device(model, f"{prefix}.{name}", "cpu", value=value)


def empty_model(folder: Path) -> nn.Module:
    """The model that config.json describes, on the meta device: shapes and names without weights, float32.

    Built by transformers from its own code, never by code from the checkpoint. Buffers that are not stored (the
    frequencies of the rotary embedding) are real.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()
    return model.eval()


def run_blocks(checkpoint: Checkpoint, tokens: np.ndarray, label: str,
               watch: Callable[[str, nn.Module], AbstractContextManager] | None = None) -> np.ndarray:
    """Final hidden states, after the last norm: float32 [sequences, length, hidden] for tokens int32 of that shape.

    Only one block's weights are in memory at a time. `watch(prefix, block)` is a context manager entered while a block
    runs over all sequences. Which mask and which positions a block is called with is the model's own affair, so it is
    recorded from a first pass in which recorders stand in the blocks' places.
    """
    model = empty_model(checkpoint.folder)
    decoder = model.get_decoder()
    blocks = list(decoder.layers)
    _fill(model, decoder.embed_tokens, EMBEDDING, checkpoint)
    calls: list[dict] = []
    decoder.layers = nn.ModuleList(_Recorder(block, calls) for block in blocks)
    norm, decoder.norm = decoder.norm, nn.Identity()
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = torch.from_numpy(tokens.astype(np.int64)).split(size)
    arguments: dict[int, list[dict]] = {}  # by batch size: positions and masks are the same for equal shapes
    hidden = []
    with torch.inference_mode():
        for batch in batches:
            calls.clear()
            hidden.append(decoder(input_ids=batch, use_cache=False).last_hidden_state)
            arguments.setdefault(len(batch), list(calls))
        decoder.layers, decoder.norm = nn.ModuleList(blocks), norm
        for index, block in enumerate(tqdm(blocks, desc=label, unit="block", disable=None)):
            prefix = f"{DECODER}.layers.{index}"
            _fill(model, block, prefix, checkpoint)
            with watch(prefix, block) if watch else nullcontext():
                _run(block, hidden, arguments, index)
            block.to("meta")
        _fill(model, norm, NORM, checkpoint)
        return torch.cat([norm(batch) for batch in hidden]).numpy()


def _run(block: nn.Module, hidden: list[torch.Tensor], arguments: dict[int, list[dict]], index: int) -> None:
    """Take all batches through one block, in place."""
    for i, batch in enumerate(hidden):
        out = block(batch, **arguments[len(batch)][index])
        hidden[i] = out[0] if isinstance(out, tuple) else out
