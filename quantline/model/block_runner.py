"""The unquantized model run one decoder block at a time, so that memory does not grow with its depth."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from tqdm import tqdm

from quantline.model.architecture import architecture
from quantline.model.device import device
from quantline.model.experts import experts_in
from quantline.model.checkpoint import Checkpoint
from quantline.model.empty_model import empty_model
from quantline.model.activation_store import Batches

BATCH_TOKENS = 4096
Watch = Callable[[str, nn.Module], AbstractContextManager]


class _Recorder(nn.Module):
    """Stands in a block's place: passes the hidden states on and keeps what else the block is called with."""

    def __init__(self, block: nn.Module, calls: list[tuple[tuple, dict]]) -> None:
        super().__init__()
        self.__dict__["block"], self.calls = block, calls

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return hidden


def _fill(model: nn.Module, module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Give a module on the meta device its weights, in float32, where they are worked with."""
    for name, _ in list(module.named_parameters()):
        value = torch.from_numpy(checkpoint.tensor(f"{prefix}.{name}"))
        set_module_tensor_to_device(model, f"{prefix}.{name}", device(), value=value)


class BlockRun:
    """The decoder's blocks over one set of tokens, int32 [sequences, length]; one block's weights in memory at a time.

    Which mask and which positions a block is called with is the model's own affair, so it is recorded from a first
    pass in which recorders stand in the blocks' places. `hidden` is what enters the next block, in batches.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        self.checkpoint, self.model = checkpoint, empty_model(checkpoint.folder)
        self.facts = architecture(checkpoint)
        decoder, outside = self.model.get_decoder(), self.facts.family.outside
        before = [module for part, module in outside.items() if part.endswith("_embd")]
        blocks, norm = (name.rpartition(".")[2] for name in (self.facts.family.blocks, outside["output_norm"]))
        self.blocks, self.norm = list(getattr(decoder, blocks)), getattr(decoder, norm)
        for name in before:
            _fill(self.model, self.model.get_submodule(name), name, checkpoint)
        calls: list[tuple[tuple, dict]] = []
        setattr(decoder, blocks, nn.ModuleList(_Recorder(block, calls) for block in self.blocks))
        setattr(decoder, norm, nn.Identity())
        batches = torch.from_numpy(tokens.astype(np.int64)).split(max(1, BATCH_TOKENS // tokens.shape[1]))
        self.hidden = Batches([(*batch.shape, self.facts.hidden_size) for batch in batches], checkpoint.folder.parent)
        self._arguments: dict[int, list[tuple[tuple, dict]]] = {}  # by batch size: they are the same for equal shapes
        with torch.no_grad():
            for number, batch in enumerate(batches):
                calls.clear()
                self.hidden[number] = decoder(input_ids=batch.to(device()), use_cache=False).last_hidden_state.cpu()
                self._arguments.setdefault(len(batch), list(calls))
        for name in before:
            self.model.get_submodule(name).to("meta")
        setattr(decoder, blocks, nn.ModuleList(self.blocks))
        setattr(decoder, norm, self.norm)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def loaded(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """(prefix, block) with the block's weights in memory."""
        prefix = self.facts.prefix(index).removesuffix(".")
        _fill(self.model, self.blocks[index], prefix, self.checkpoint)
        yield prefix, self.blocks[index]
        self.blocks[index].to("meta")

    def call(self, index: int, batch: torch.Tensor) -> torch.Tensor:
        """What a loaded block makes of one batch of `hidden`, on the device where it is loaded."""
        args, kwargs = self._arguments[len(batch)][index]
        out = self.blocks[index](batch, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _starve(self, index: int) -> None:
        """Find the experts of a loaded block that too few tokens come to, in a pass of its own."""
        mixtures = experts_in(self.blocks[index]).values()
        for batch in self.hidden if mixtures else ():
            self.call(index, batch.to(device()))
        for experts in mixtures:
            experts.starve()
            experts.seen = [0] * len(experts)

    def forward(self, label: str, watch: Watch | None = None, after: Callable[[int], None] | None = None,
                start: int = 0, starve: bool = False) -> None:
        """Take `hidden` through the blocks from `start` on. `watch(prefix, block)` is entered while a block runs over all
        batches; `after(block)` is called when it has. With `starve`, starved experts show all tokens to who watches.
        """
        with torch.no_grad():
            for index in tqdm(range(start, len(self.blocks)), desc=label, unit="block", disable=None):
                with self.loaded(index) as (prefix, block):
                    if starve:
                        self._starve(index)
                    with watch(prefix, block) if watch else nullcontext():
                        for number, batch in enumerate(self.hidden):
                            self.hidden[number] = self.call(index, batch.to(device())).cpu()
                if after:
                    after(index)

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """The norm after the last block, with its weights in memory."""
        _fill(self.model, self.norm, self.facts.family.outside["output_norm"], self.checkpoint)
        yield self.norm
        self.norm.to("meta")


def whole_logits(checkpoint: Checkpoint, tokens: np.ndarray) -> torch.Tensor:
    """Logits float32 [sequences, length, V] of the model's own forward pass for tokens int32 [sequences, length]. Each block's
    weights are loaded as it is called and dropped when it has run.
    """
    run = BlockRun(checkpoint, tokens[:, :1])
    model, outside = run.model, run.facts.family.outside
    for part, name in outside.items():
        if part != "output" or not run.facts.tied:
            _fill(model, model.get_submodule(name), name, checkpoint)
    model.tie_weights()
    for index, block in enumerate(run.blocks):
        prefix = run.facts.prefix(index).removesuffix(".")
        block.register_forward_pre_hook(lambda block, _, prefix=prefix: _fill(model, block, prefix, checkpoint))
        block.register_forward_hook(lambda block, *_: block.to("meta") and None)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens.astype(np.int64)).to(device()), use_cache=False).logits.float().cpu()


def run_blocks(checkpoint: Checkpoint, tokens: np.ndarray, label: str, watch: Watch | None = None) -> np.ndarray:
    """Final hidden states, after the last norm: float32 [sequences, length, hidden] for tokens int32 of that shape."""
    run = BlockRun(checkpoint, tokens)
    run.forward(label, watch)
    found, start = np.empty((*tokens.shape, run.facts.hidden_size), np.float32), 0
    with torch.no_grad(), run.final_norm() as norm:
        for batch in run.hidden:
            found[start:start + len(batch)] = norm(batch.to(device())).cpu()
            start += len(batch)
    return found
