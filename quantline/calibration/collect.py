"""The calibration: second moments of the inputs of every linear layer of the decoder blocks, and of the gradients at
their outputs where those are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from quantline.calibration import packing
from quantline.model.architecture import Architecture, architecture
from quantline.model.checkpoint import Checkpoint, read_json
from quantline.errors import Failure, StageError
from quantline.files import write_json

if TYPE_CHECKING:
    import torch

    from quantline.model.block_runner import BlockRun
    from quantline.model.activation_store import Batches, StoredStates

INPUTS, OUTPUTS, ABOUT = "inputs", "outputs", "calibration.json"
SAMPLE = 128  # tokens whose inputs are kept
SMALLEST = 1e-20  # of a channel that is zero throughout
COLUMNS = 256  # of a product that are computed at once
WIDEST_FACTOR = 512  # outputs that one block of an output factor spans: wider ones cost more than they bring


class InputMoments:
    """Sums XᵀX over the inputs of a block's linear layers; layers that read the same tensor share one sum.

    Which layers share is seen from the tensors themselves, not from names. Each batch's product is computed in float32
    and summed in float64: over a long text float32 sums would lose the small channels beside the large ones.
    """

    def __init__(self, tokens: int, keep: Callable[..., None]) -> None:
        """`keep(key, H, peak=, sample=)` takes each finished H = XᵀX / n, float32 [in, in], the largest |X| per channel
        [in], and as shares of that some of the rows of X, float16, evenly spread over the `tokens` of the text.
        """
        self.keep, self.stride = keep, max(1, tokens // SAMPLE)
        self.layers: dict[str, dict] = {}  # linear → {moments: key, tokens: n}
        self._sums: dict[str, torch.Tensor] = {}  # first layer that reads the input → of the block that runs now, XᵀX above the diagonal
        self._peaks: dict[str, torch.Tensor] = {}  # the same for max |X|
        self._samples: dict[str, list[torch.Tensor]] = {}  # the same for rows of X
        self._now: list[tuple[torch.Tensor, str]] = []  # inputs of this batch; held, so that none takes another's place

    @contextmanager
    def watch(self, prefix: str, block: "torch.nn.Module") -> Iterator[None]:
        """Listen to every linear layer of a block while it runs."""
        import torch
        from torch import nn

        def listen(name: str) -> Callable:
            return lambda module, args: self._see(name, args[0])

        hooks = [module.register_forward_pre_hook(listen(f"{prefix}.{name}"))
                 for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        hooks.append(block.register_forward_pre_hook(lambda module, args: self._now.clear()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._now.clear()
        while self._sums:
            key = next(iter(self._sums))
            moment = whole(self._sums.pop(key)).div_(self.layers[key]["tokens"]).float()
            peak = self._peaks.pop(key)
            shares = torch.cat(self._samples.pop(key)) / peak.clamp(min=SMALLEST)
            self.keep(key, moment.cpu().numpy(), peak=peak.cpu().numpy(), sample=shares.half().cpu().numpy())

    def _see(self, name: str, inputs: "torch.Tensor") -> None:
        """A layer is about to read `inputs` [batch, length, in]."""
        import torch

        rows = inputs.reshape(-1, inputs.shape[-1])
        key = next((key for tensor, key in self._now if tensor is inputs), None)
        if key is None:
            self._now.append((inputs, name))
            key, peak = name, rows.abs().amax(0)
            if key not in self._sums:
                self._sums[key] = rows.new_zeros((rows.shape[1],) * 2, dtype=torch.float64)
            add_products(self._sums[key], rows)
            self._peaks[key] = torch.maximum(self._peaks[key], peak) if key in self._peaks else peak
            self._samples.setdefault(key, []).append(rows[::self.stride].clone())
        about = self.layers.setdefault(name, {"moments": key, "tokens": 0})
        about["tokens"] += len(rows)


def add_products(total: "torch.Tensor", rows: "torch.Tensor") -> None:
    """Add XᵀX of rows [n, in], float32, to what lies on and above the diagonal of `total`, float64 [in, in]. Little is
    computed of what lies below.
    """
    for start in range(0, rows.shape[1], COLUMNS):
        span = slice(start, start + COLUMNS)
        total[span, start:] += rows[:, span].T @ rows[:, start:]


def whole(upper: "torch.Tensor") -> "torch.Tensor":
    """The symmetric matrix of what lies on and above the diagonal of `upper`, which is changed into it."""
    return upper.triu_().add_(upper.triu(1).T)


def check(key: str, moment: np.ndarray) -> None:
    """Raise StageError: non_finite, or calibration_empty if the inputs were all zero."""
    if not np.isfinite(moment).all():
        raise StageError(Failure.NON_FINITE, f"expected finite inputs and gradients of {key}, found NaN or infinity in "
                                             "their second moments; the model overflows on the calibration text")
    if not np.diagonal(moment, axis1=-2, axis2=-1).sum() > 0:
        raise StageError(Failure.CALIBRATION_EMPTY, f"expected inputs and gradients of {key} that are not all zero; "
                                                    "look at the calibration text and at the layer before")


class _Parts:
    """What is collected of one block at a time, as files `<kind>-<block>.safetensors`; a file that is there is complete."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind, self.tensors = folder, kind, {}

    def add(self, name: str, matrix: np.ndarray, **more: np.ndarray) -> None:
        """Keep the moments of a layer of the present block, and `more` of it as it is. Raises as `check` does."""
        check(name, matrix)
        self.tensors |= {f"{name}.{part}": values for part, values in more.items()}
        self.tensors |= dict(zip((f"{name}.diagonal", f"{name}.triangle"), packing.pack(matrix), strict=True))

    def close(self, block: int) -> None:
        """Write the block's file, beside and renamed."""
        beside = self.folder / "part"
        save_file(dict(sorted(self.tensors.items())), beside)
        beside.rename(self.folder / part_name(self.kind, block))
        self.tensors = {}

    def there(self, block: int) -> bool:
        return (self.folder / part_name(self.kind, block)).is_file()


def part_name(kind: str, block: int) -> str:
    """The file of a block's `inputs` or `outputs`."""
    return f"{kind}-{block:03d}.safetensors"


def collect(checkpoint: Checkpoint, tokens: np.ndarray, folder: Path, seed: int | None = None) -> dict[str, dict]:
    """Write the moments of every distinct input to `folder`; returns {linear: {moments: key, tokens: n, block: b}}, with
    `starved: True` for the experts that were calibrated on all tokens, as too few came to them (quantline/model/experts.py).

    `tokens` int32 [sequences, length]. One block's weights and moments are in memory at a time. With a `seed` a backward
    pass follows, with labels drawn by it, and the output factors are written too. Blocks whose files are in the folder
    already are not run again.
    Raises StageError: non_finite, calibration_empty (also for a linear layer of the blocks that saw nothing).
    """
    from quantline.model.block_runner import BlockRun
    from quantline.calibration.embedding_and_head import keep_final
    from quantline.model.experts import experts_in
    from quantline.model.activation_store import StoredStates

    facts = architecture(checkpoint)
    run, parts = BlockRun(checkpoint, tokens), _Parts(folder, INPUTS)
    inputs = InputMoments(tokens.size, parts.add)
    states = StoredStates(folder / "states", 2 if seed is None else facts.layers + 1, run.hidden)
    told = folder / "layers.json"  # what was seen of the blocks that are complete

    def after(block: int) -> None:
        states.put(block + 1, run.hidden)
        for name, experts in experts_in(run.blocks[block]).items():
            for number, seen in enumerate(experts.seen):
                for part in facts.family.expert_names:
                    about = inputs.layers[f"{facts.prefix(block)}{name}.{number}.{part}"]
                    about |= {"tokens": seen} | ({"starved": True} if number in experts.starved else {})
        write_json(told, inputs.layers)
        parts.close(block)

    start = next((block for block in range(facts.layers) if not parts.there(block)), facts.layers)
    if start:
        inputs.layers = read_json(told)
        run.hidden.fill(states.get(start))
    else:
        states.put(0, run.hidden)
    run.forward("calibrating", inputs.watch, after, start, starve=True)
    check_seen(facts, inputs.layers, tokens.size)
    keep_final(run, tokens.size, folder)
    if seed is not None:
        _collect_gradients(checkpoint, run, states, folder, seed, inputs.layers)
    (folder / "states").unlink()
    told.unlink()
    return {name: about | {"block": facts.layer_index(name)} for name, about in sorted(inputs.layers.items())}


def check_seen(facts: Architecture, layers: dict[str, dict], tokens: int) -> None:
    """Raise StageError(calibration_empty) unless every layer saw all tokens, and a block's experts together each token as
    often as the router chooses.
    """
    for layer in range(facts.layers):
        for module in facts.block(layer).linears:
            names = [facts.prefix(layer) + one for one in facts.each(module)]
            wanted = tokens * (facts.experts_used if "*" in module else 1)
            found = sum(layers.get(name, {"tokens": 0})["tokens"] for name in names)
            if not found == wanted:
                raise StageError(Failure.CALIBRATION_EMPTY, f"expected {facts.prefix(layer)}{module} to see {wanted} tokens, "
                                                            f"found {found}")


def _collect_gradients(checkpoint: Checkpoint, run: "BlockRun", states: "StoredStates", folder: Path, seed: int,
                       layers: dict[str, dict]) -> None:
    """The backward pass of `collect`, from the block where an earlier run stopped."""

    from quantline.calibration.embedding_and_head import keep_embedding
    from quantline.model.experts import experts_in
    from quantline.calibration.output_moments import (
        OutputMoments,
        backward,
        first_gradients,
        head_of,
    )
    from quantline.model.activation_store import StoredStates

    facts, parts = architecture(checkpoint), _Parts(folder, OUTPUTS)
    gradients = StoredStates(folder / "gradients", 2, run.hidden)
    for index, block in enumerate(run.blocks):  # also of blocks that an earlier run has seen
        for name, experts in experts_in(block).items():
            gate, count = facts.family.expert_names[0], len(experts)
            experts.starved = frozenset(number for number in range(count)
                                        if layers[f"{facts.prefix(index)}{name}.{number}.{gate}"].get("starved"))

    def after(block: int, entering: "Batches") -> None:
        gradients.put(block, entering)
        parts.close(block)

    last = next((block for block in reversed(range(facts.layers)) if not parts.there(block)), -1)
    if last == facts.layers - 1:
        leaving = first_gradients(run, states.get(facts.layers), head_of(checkpoint), seed)
    else:
        leaving = run.hidden.like()
        leaving.fill(gradients.get(last + 1))
    backward(run, states, leaving, OutputMoments(WIDEST_FACTOR, parts.add), last, after)
    keep_embedding(leaving, WIDEST_FACTOR, folder)
    (folder / "gradients").unlink()


class Moments:
    """Reads artifacts/calibration."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = read_json(self.folder / ABOUT)
        self.layers = sorted(self.info["layers"])

    def tokens(self, linear: str) -> int:
        """How many tokens the layer saw."""
        return self.info["layers"][linear]["tokens"]

    def seen(self, linear: str) -> dict:
        """{tokens: how many the layer saw}, and {starved: True} for an expert that was calibrated on all tokens instead."""
        about = self.info["layers"].get(linear, {"tokens": 0})
        return {key: about[key] for key in ("tokens", "starved") if key in about}

    def shared(self, linear: str) -> str | None:
        """What layers have in common that read one input; None for one that was not calibrated."""
        return self.info["layers"].get(linear, {}).get("moments")

    def _check_seen(self, linear: str) -> None:
        seen = self.seen(linear)
        if not (seen["tokens"] > 0 or seen.get("starved")):
            raise StageError(Failure.CALIBRATION_EMPTY, f"{linear} saw no calibration tokens; run calibrate again")

    def moment(self, linear: str) -> np.ndarray:
        """H = XᵀX / n of the layer's inputs, float32 [in, in].

        Raises StageError(calibration_empty) if the layer saw nothing, non_finite if H is not finite.
        """
        self._check_seen(linear)
        return self._get(linear, INPUTS, self.info["layers"][linear]["moments"])

    def diagonal(self, linear: str) -> np.ndarray:
        """The diagonal of H, float32 [in], without reading the rest. Raises as `moment` does."""
        self._check_seen(linear)
        found = self._whole(linear, "diagonal")
        check(linear, found[:, None, None])
        return found

    def peak(self, linear: str) -> np.ndarray:
        """The largest |x| of each of the layer's inputs, float32 [in]."""
        return self._whole(linear, "peak")

    def sample(self, linear: str) -> np.ndarray:
        """The layer's inputs at some tokens, float32 [tokens, in]."""
        return self._whole(linear, "sample").astype(np.float32) * self.peak(linear)

    def _whole(self, linear: str, part: str) -> np.ndarray:
        about = self.info["layers"][linear]
        with safe_open(self.folder / part_name(INPUTS, about["block"]), "np") as file:
            return file.get_tensor(f"{about['moments']}.{part}")

    def factors(self, linear: str) -> np.ndarray:
        """G, the diagonal blocks of the output factor of the curvature: float32 [blocks, size, size].

        Raises StageError: calibration_empty if they were not collected, non_finite.
        """
        if not self.info["curvature"]:
            raise StageError(Failure.CALIBRATION_EMPTY, "expected a calibration with gradients, which curvature rounding "
                             "needs, found one without; set calibration.curvature=true")
        return self._get(linear, OUTPUTS, linear)

    def importance(self, linear: str) -> np.ndarray:
        """The diagonal of G, float32 [out]. Raises as `factors` does."""
        factors = self.factors(linear)
        return np.ascontiguousarray(np.diagonal(factors, axis1=-2, axis2=-1)).reshape(-1)

    def _get(self, linear: str, kind: str, key: str) -> np.ndarray:
        with safe_open(self.folder / part_name(kind, self.info["layers"][linear]["block"]), "np") as file:
            found = packing.unpack(file.get_tensor(f"{key}.diagonal"), file.get_tensor(f"{key}.triangle"))
        check(linear, found)
        return found

    def provenance(self) -> dict:
        """What a manifest says of the calibration."""
        return {key: self.info[key] for key in ("text_sha256", "tokens", "seed")}
