"""The calibration: second moments of the inputs of every linear layer of the decoder blocks, and of the gradients at
their outputs where those are asked for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from stages.checkpoints import packing
from stages.checkpoints.architecture import architecture
from stages.checkpoints.reader import Checkpoint, read_json
from stages.checkpoints.stream import SafetensorsStream
from stages.tracking import Failure, StageError

if TYPE_CHECKING:
    import torch

MOMENTS, ABOUT = "moments.safetensors", "calibration.json"
PARTS = ("inputs.diagonal", "inputs.triangle", "outputs.diagonal", "outputs.triangle")
WIDEST_FACTOR = 512  # outputs that one block of an output factor spans: wider ones cost more than they bring


class InputMoments:
    """Sums XᵀX over the inputs of a block's linear layers; layers that read the same tensor share one sum.

    Which layers share is seen from the tensors themselves, not from names. Each batch's product is computed in float32
    and summed in float64: over a long text float32 sums would lose the small channels beside the large ones.
    """

    def __init__(self, keep: Callable[[str, np.ndarray], None]) -> None:
        """`keep(key, H)` takes each finished H = XᵀX / n, float32 [in, in], when its block has run."""
        self.keep = keep
        self.layers: dict[str, dict] = {}  # linear → {moments: key, tokens: n}
        self._sums: dict[str, torch.Tensor] = {}  # first layer that reads the input → XᵀX of the block that runs now
        self._now: list[tuple[torch.Tensor, str]] = []  # inputs of this batch; held, so that none takes another's place

    @contextmanager
    def watch(self, prefix: str, block: "torch.nn.Module") -> Iterator[None]:
        """Listen to every linear layer of a block while it runs."""
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
            self.keep(key, (self._sums.pop(key) / self.layers[key]["tokens"]).float().numpy())

    def _see(self, name: str, inputs: "torch.Tensor") -> None:
        """A layer is about to read `inputs` [batch, length, in]."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        key = next((key for tensor, key in self._now if tensor is inputs), None)
        if key is None:
            self._now.append((inputs, name))
            key, product = name, (rows.T @ rows).double()
            self._sums[key] = self._sums[key].add_(product) if key in self._sums else product
        about = self.layers.setdefault(name, {"moments": key, "tokens": 0})
        about["tokens"] += len(rows)


def check(key: str, moment: np.ndarray) -> None:
    """Raise StageError: non_finite, or calibration_empty if the inputs were all zero."""
    if not np.isfinite(moment).all():
        raise StageError(Failure.NON_FINITE, f"expected finite inputs and gradients of {key}, found NaN or infinity in "
                                             "their second moments; the model overflows on the calibration text")
    if not np.diagonal(moment, axis1=-2, axis2=-1).sum() > 0:
        raise StageError(Failure.CALIBRATION_EMPTY, f"expected inputs and gradients of {key} that are not all zero; "
                                                    "look at the calibration text and at the layer before")


def collect(checkpoint: Checkpoint, tokens: np.ndarray, path: Path, seed: int | None = None) -> dict[str, dict]:
    """Write the moments of every distinct input to `path`; returns {linear: {moments: key, tokens: n}}.

    `tokens` int32 [sequences, length]. One block's moments are in memory at a time. With a `seed` a backward pass
    follows, with labels drawn by it, and the output factors are written too.
    Raises StageError: non_finite, calibration_empty (also for a linear layer of the blocks that saw nothing).
    """
    from stages.checkpoints.blocks import BlockRun

    facts = architecture(checkpoint)
    linears = facts.linears()
    with SafetensorsStream(path, [f"{name}.{part}" for name in linears for part in PARTS]) as stream:
        def keep(kind: str) -> Callable[[str, np.ndarray], None]:
            def write(name: str, matrix: np.ndarray) -> None:
                check(name, matrix)
                for part, values in zip(("diagonal", "triangle"), packing.pack(matrix), strict=True):
                    stream.add(f"{name}.{kind}.{part}", values)

            return write

        inputs, run = InputMoments(keep("inputs")), BlockRun(checkpoint, tokens)
        if seed is None:
            run.forward("calibrating", inputs.watch)
        else:
            import torch

            from stages.checkpoints.gradients import OutputMoments, collect_gradients, stored_inputs

            head = torch.from_numpy(checkpoint.tensor(facts.head))
            with stored_inputs(path.parent, run) as stored:
                run.forward("calibrating", inputs.watch, stored.keep)
                collect_gradients(run, stored, head, facts.logit_scale, facts.logit_softcap, seed,
                                  OutputMoments(WIDEST_FACTOR, keep("outputs")))
    for name in linears:
        if not inputs.layers.get(name, {"tokens": 0})["tokens"] == tokens.size:
            raise StageError(Failure.CALIBRATION_EMPTY, f"expected {name} to see {tokens.size} tokens, found "
                                                        f"{inputs.layers.get(name, {'tokens': 0})['tokens']}")
    return dict(sorted(inputs.layers.items()))


class Moments:
    """Reads artifacts/calibration."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.info = read_json(self.folder / ABOUT)
        self.layers = sorted(self.info["layers"])

    def tokens(self, linear: str) -> int:
        """How many tokens the layer saw."""
        return self.info["layers"][linear]["tokens"]

    def moment(self, linear: str) -> np.ndarray:
        """H = XᵀX / n of the layer's inputs, float32 [in, in].

        Raises StageError(calibration_empty) if the layer saw nothing, non_finite if H is not finite.
        """
        if linear not in self.info["layers"] or not self.tokens(linear) > 0:
            raise StageError(Failure.CALIBRATION_EMPTY, f"{linear} saw no calibration tokens; run calibrate again")
        return self._get(linear, f"{self.info['layers'][linear]['moments']}.inputs")

    def factors(self, linear: str) -> np.ndarray:
        """G, the diagonal blocks of the output factor of the curvature: float32 [blocks, size, size].

        Raises StageError: calibration_empty if they were not collected, non_finite.
        """
        if not self.info["curvature"]:
            raise StageError(Failure.CALIBRATION_EMPTY, "expected a calibration with gradients, which curvature rounding "
                             "needs, found one without; set calibration.curvature=true")
        return self._get(linear, f"{linear}.outputs")

    def _get(self, linear: str, key: str) -> np.ndarray:
        with safe_open(self.folder / MOMENTS, "np") as file:
            found = packing.unpack(file.get_tensor(f"{key}.diagonal"), file.get_tensor(f"{key}.triangle"))
        check(linear, found)
        return found

    def provenance(self) -> dict:
        """What a manifest says of the calibration."""
        return {key: self.info[key] for key in ("text_sha256", "tokens", "seed")}
