"""Running the unquantized model one decoder block at a time, so that memory ignores its depth."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from tqdm import tqdm

from quantline.model.activation_store import ActivationBatches
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.empty_model import empty_model
from quantline.model.experts import experts_in
from quantline.model.same_bits import same_bits

BATCH_TOKENS = 4096
Watch = Callable[[str, nn.Module], AbstractContextManager[None]]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides hidden states


class _Recorder(nn.Module):
    """Stands in for a block: passes hidden states on and records what else the block is given."""

    def __init__(self, block: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((args, kwargs))
        return hidden


def _load_weights(model: nn.Module, module: nn.Module, prefix: str, checkpoint: Checkpoint) -> None:
    """Give a module on the meta device its weights, in float32, on the device of computation."""
    for name, _ in list(module.named_parameters()):
        value = torch.from_numpy(checkpoint.tensor(f"{prefix}.{name}"))
        set_module_tensor_to_device(model, f"{prefix}.{name}", device(), value=value)


class BlockRun:
    """The decoder's blocks over one set of tokens; one block's weights in memory at a time.

    Which mask and positions a block is called with is the model's own affair, so it is recorded
    from a first pass in which recorders stand in for the blocks.

    Attributes:
        hidden: What enters the next block, in batches.
        blocks: The decoder blocks, on the meta device unless loaded.
        arch: Sizes and names of the model.
    """

    def __init__(self, checkpoint: Checkpoint, tokens: np.ndarray) -> None:
        """Embed the tokens, int32 [sequences, length]."""
        self.checkpoint = checkpoint
        self.model = empty_model(checkpoint.folder)
        self.arch = checkpoint.arch
        decoder = self.model.get_decoder()
        outside = self.arch.family.outside
        embeddings = [module for part, module in outside.items() if part.endswith("_embd")]
        blocks_name = self.arch.family.blocks.rpartition(".")[2]
        norm_name = outside["output_norm"].rpartition(".")[2]
        self.blocks = list(getattr(decoder, blocks_name))
        self.norm = getattr(decoder, norm_name)
        for name in embeddings:
            _load_weights(self.model, self.model.get_submodule(name), name, checkpoint)
        calls: list[Call] = []
        recorders = nn.ModuleList(_Recorder(block, calls) for block in self.blocks)
        setattr(decoder, blocks_name, recorders)
        setattr(decoder, norm_name, nn.Identity())
        batch_size = max(1, BATCH_TOKENS // tokens.shape[1])
        batches = torch.from_numpy(tokens.astype(np.int64)).split(batch_size)
        shapes = [(*batch.shape, self.arch.hidden_size) for batch in batches]
        self.hidden = ActivationBatches(shapes, checkpoint.folder.parent)
        # By batch size: the arguments are the same for equal shapes.
        self._calls: dict[int, list[Call]] = {}
        with torch.no_grad():
            for index, batch in enumerate(batches):
                calls.clear()
                out = decoder(input_ids=batch.to(device()), use_cache=False)
                self.hidden[index] = out.last_hidden_state.cpu()
                self._calls.setdefault(len(batch), list(calls))
        for name in embeddings:
            self.model.get_submodule(name).to("meta")
        setattr(decoder, blocks_name, nn.ModuleList(self.blocks))
        setattr(decoder, norm_name, self.norm)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    @contextmanager
    def loaded(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """Yield (prefix, block) with the block's weights in memory."""
        prefix = self.arch.prefix(index).removesuffix(".")
        _load_weights(self.model, self.blocks[index], prefix, self.checkpoint)
        yield prefix, self.blocks[index]
        self.blocks[index].to("meta")

    def call(self, index: int, batch: torch.Tensor) -> torch.Tensor:
        """Run a loaded block on one batch of hidden states, which lies on the block's device."""
        args, kwargs = self._calls[len(batch)][index]
        out = self.blocks[index](batch, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _find_undercalibrated(self, index: int) -> None:
        """Mark the experts of a loaded block that too few tokens reach, in a pass of its own."""
        expert_modules = experts_in(self.blocks[index]).values()
        if not expert_modules:
            return
        for batch in self.hidden:
            self.call(index, batch.to(device()))
        for experts in expert_modules:
            experts.mark_undercalibrated()
            experts.tokens_seen = [0] * len(experts)

    def forward(
        self,
        label: str,
        watch: Watch | None = None,
        after: Callable[[int], None] | None = None,
        start: int = 0,
        find_undercalibrated: bool = False,
    ) -> None:
        """Take `hidden` through the blocks.

        Args:
            label: Of the progress bar.
            watch: watch(prefix, block) is entered while a block runs over all batches.
            after: after(index) is called when a block has run.
            start: The first block to run.
            find_undercalibrated: Whether experts that too few tokens reach show `watch` all tokens.
        """
        with torch.no_grad():
            indices = range(start, len(self.blocks))
            for index in tqdm(indices, desc=label, unit="block", disable=None):
                with self.loaded(index) as (prefix, block):
                    if find_undercalibrated:
                        self._find_undercalibrated(index)
                    with watch(prefix, block) if watch else nullcontext():
                        for number, batch in enumerate(self.hidden):
                            self.hidden[number] = self.call(index, batch.to(device())).cpu()
                if after:
                    after(index)

    @contextmanager
    def final_norm(self) -> Iterator[nn.Module]:
        """Yield the norm after the last block, with its weights in memory."""
        name = self.arch.family.outside["output_norm"]
        _load_weights(self.model, self.norm, name, self.checkpoint)
        yield self.norm
        self.norm.to("meta")


def prepare_blocks(checkpoint: Checkpoint) -> None:
    """Let the model make masks and positions for its blocks, without any of its weights.

    Raises:
        Exception: What its own code raises.
    """
    model = empty_model(checkpoint.folder)
    family = checkpoint.arch.family
    for part, name in family.outside.items():
        if part.endswith("_embd"):
            width = model.get_submodule(name).embedding_dim
            model.set_submodule(name, nn.Embedding(1, width, device=device()))
    decoder = model.get_decoder()
    blocks_name = family.blocks.rpartition(".")[2]
    recorders = nn.ModuleList(_Recorder(block, []) for block in getattr(decoder, blocks_name))
    setattr(decoder, blocks_name, recorders)
    setattr(decoder, family.outside["output_norm"].rpartition(".")[2], nn.Identity())
    with torch.no_grad():
        embedded = torch.zeros((1, 1, checkpoint.arch.hidden_size), device=device())
        decoder(inputs_embeds=embedded, use_cache=False)


@same_bits()
def full_model_logits(checkpoint: Checkpoint, tokens: np.ndarray) -> torch.Tensor:
    """Run the model's own forward pass.

    Each block's weights are loaded as it is called and dropped when it has run.

    Args:
        checkpoint: The model.
        tokens: int32 [sequences, length].

    Returns:
        Logits float32 [sequences, length, vocabulary].
    """
    run = BlockRun(checkpoint, tokens[:, :1])
    model = run.model
    for part, name in run.arch.family.outside.items():
        if part != "output" or not run.arch.tied:
            _load_weights(model, model.get_submodule(name), name, checkpoint)
    model.tie_weights()
    for index, block in enumerate(run.blocks):
        prefix = run.arch.prefix(index).removesuffix(".")

        def load(block: nn.Module, args: Any, prefix: str = prefix) -> None:
            _load_weights(model, block, prefix, checkpoint)

        def drop(block: nn.Module, args: Any, out: Any) -> None:
            block.to("meta")

        block.register_forward_pre_hook(load)
        block.register_forward_hook(drop)
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device())
        return model(input_ids=ids, use_cache=False).logits.float().cpu()


@same_bits()
def final_hidden_states(
    checkpoint: Checkpoint, tokens: np.ndarray, label: str, watch: Watch | None = None
) -> np.ndarray:
    """Run the blocks and the last norm.

    Args:
        checkpoint: The model.
        tokens: int32 [sequences, length].
        label: Of the progress bar.
        watch: As in BlockRun.forward.

    Returns:
        float32 [sequences, length, hidden].
    """
    run = BlockRun(checkpoint, tokens)
    run.forward(label, watch)
    states = np.empty((*tokens.shape, run.arch.hidden_size), np.float32)
    start = 0
    with torch.no_grad(), run.final_norm() as norm:
        for batch in run.hidden:
            states[start : start + len(batch)] = norm(batch.to(device())).cpu()
            start += len(batch)
    return states
