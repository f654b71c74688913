"""Merging a PEFT LoRA adapter into a checkpoint, tensor by tensor.

W + (alpha / r) B A (Hu et al. 2021, section 4.1); with rank-stabilized LoRA the scaling is
alpha / sqrt(r) (Kalajdzievski 2023); DoRA scales each row of the sum to a learned norm (Liu et al.
2024, equation 5). Modules that were trained whole (`modules_to_save`, biases) replace the base's.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from quantline.errors import Failure, StageError, reading_foreign
from quantline.files import read_json
from quantline.model.checkpoint import Checkpoint, inside
from quantline.model.safetensors_writer import SafetensorsWriter
from quantline.run.bounded_call import pattern_begins

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "norm",
    ".lora_magnitude_vector.weight": "norm",
}
UNSUPPORTED = (
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)
# Other initializations (PiSSA, OLoRA, CorDA, LoftQ, …) change the base too, so that W + BA is not
# what was trained.
BASE_UNTOUCHED = (None, True, False, "gaussian", "eva", "orthogonal")
# What to do about an adapter that is not as expected.
NAME_BASE = "name the base model that it was trained on"
MERGE_FIRST = "merge this one with peft first, and load the result"
SAVE_AGAIN = "fetch it again, or save it again with peft"
RECORDED = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


class Adapter:
    """An adapter folder, checked against the base that it is to be merged into.

    Attributes:
        pairs: Base tensor → part ("down", "up", "norm") → key in the adapter's file.
        replaced: Base tensor → key of the tensor that replaces it.

    Raises:
        StageError: adapter_mismatch, unsafe_checkpoint, missing_file, path_escape.
    """

    @reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter as peft saves it")
    def __init__(self, folder: Path, base: Checkpoint) -> None:
        """Read the adapter's configuration and the names of its tensors."""
        self.folder = folder
        self.config = read_json(inside(folder, CONFIG))
        self.path = inside(folder, WEIGHTS)
        if not self.path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise StageError(
                Failure.UNSAFE_CHECKPOINT if pickled else Failure.MISSING_FILE,
                f"expected {WEIGHTS} in {folder}, found {'only a pickle' if pickled else 'none'}; "
                "save the adapter as safetensors",
            )
        self._check_config()
        self.pairs: dict[str, dict[str, str]] = {}
        self.replaced: dict[str, str] = {}
        try:
            with safe_open(self.path, "np") as file:
                keys = sorted(file.keys())
        except SafetensorError as error:
            raise self.mismatch(
                f"a readable {WEIGHTS}, found a damaged one ({error})", SAVE_AGAIN
            ) from None
        for key in keys:
            self._assign(key, base)
        needed = {"down", "up", "norm"} if self.config.get("use_dora") else {"down", "up"}
        for name, parts in self.pairs.items():
            if set(parts) != needed:
                wanted = ", ".join(sorted(needed))
                found = ", ".join(sorted(parts))
                raise self.mismatch(f"{wanted} for {name}, found {found}", SAVE_AGAIN)
        if not self.pairs and not self.replaced:
            raise self.mismatch("at least one tensor, found none", SAVE_AGAIN)

    def _check_config(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise self.mismatch(f"peft_type LORA, found {kind}", MERGE_FIRST)
        odd = [key for key in UNSUPPORTED if self.config.get(key)]
        initialization = self.config.get("init_lora_weights")
        if initialization not in BASE_UNTOUCHED:
            odd.append(f"init_lora_weights={initialization}")
        if odd:
            raise self.mismatch(f"LoRA without {', '.join(odd)}", MERGE_FIRST)

    def _assign(self, key: str, base: Checkpoint) -> None:
        """Find the base tensor that a tensor of the adapter belongs to."""
        name = key.removeprefix(PREFIX)
        target = name
        for suffix, part in PARTS.items():
            if name.endswith(suffix):
                target = name.removesuffix(suffix) + ".weight"
                self.pairs.setdefault(target, {})[part] = key
                break
        else:
            self.replaced[target] = key
        tied = (base.tied_head, base.arch.embedding)
        if base.tied_head is not None and target in tied:
            raise self.mismatch(
                "only changes to tensors that the base does not share between embedding and head, "
                f"found {key}",
                MERGE_FIRST,
            )
        if target not in base.names:
            raise self.mismatch(
                f"only changes to tensors of the base, found {key}, which the base does not have",
                NAME_BASE,
            )

    def mismatch(self, expected: str, advice: str) -> StageError:
        """Return the error for an adapter that is not as expected.

        Args:
            expected: What was expected and what was found.
            advice: What to do next.
        """
        message = f"expected in the adapter {self.folder} {expected}; {advice}"
        return StageError(Failure.ADAPTER_MISMATCH, message)

    def scaling(self, name: str, rank: int) -> float:
        """Return what B A is multiplied by, as peft's `scaling`.

        Patterns are regular expressions for the end of a module's name, as in peft.
        """
        module = name.removesuffix(".weight")

        def setting(patterns: dict[str, float] | None, otherwise: float) -> float:
            for pattern, value in (patterns or {}).items():
                if pattern_begins(rf"(.*\.)?({pattern})$", module):
                    return value
            return otherwise

        expected = setting(self.config.get("rank_pattern"), self.config["r"])
        if rank != expected:
            raise self.mismatch(f"rank {expected} for {module}, found {rank}", SAVE_AGAIN)
        alpha = setting(self.config.get("alpha_pattern"), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter as peft saves it")
    def merged(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor of the base with the adapter in it.

        It is computed in float32 and returned in the base's dtype.

        Raises:
            StageError: adapter_mismatch, non_finite.
        """
        with safe_open(self.path, "np") as file:

            def read(key: str) -> np.ndarray:
                return file.get_tensor(key).astype(np.float32)

            if name in self.replaced:
                result = read(self.replaced[name])
            else:
                parts = {part: read(key) for part, key in self.pairs[name].items()}
                result = self._add(name, tensor, parts)
        if result.shape != tensor.shape:
            raise self.mismatch(f"{name} of shape {tensor.shape}, found {result.shape}", NAME_BASE)
        result = result.astype(tensor.dtype)
        if not np.isfinite(result).all():
            raise StageError(
                Failure.NON_FINITE,
                f"expected a finite {name} after merging {self.folder}, found NaN or infinity; "
                "the adapter's training broke",
            )
        return result

    def _add(self, name: str, tensor: np.ndarray, parts: dict[str, np.ndarray]) -> np.ndarray:
        """Return W + scaling · B A, with the rows' norms of DoRA if there are any."""
        down = parts["down"]
        up = parts["up"]
        matrices = down.ndim == 2 and up.ndim == 2
        fit = matrices and (up.shape[0], down.shape[1]) == tensor.shape
        if not fit or up.shape[1] != down.shape[0]:
            raise self.mismatch(
                f"B A of shape {tensor.shape} for {name}, found {up.shape} times {down.shape}",
                NAME_BASE,
            )
        scaling = np.float32(self.scaling(name, len(down)))
        result = tensor.astype(np.float32) + scaling * (up @ down)
        if "norm" in parts:
            norms = np.linalg.norm(result, axis=1)
            result *= (parts["norm"].reshape(-1) / norms)[:, None]
        return result


def merge(base: Checkpoint, folder: Path, target: Path) -> dict[str, Any]:
    """Write the files of `base` that the adapter changes into `target`, anew.

    Files without changed tensors stay as they are there. One tensor is in memory at a time.

    Returns:
        The step for the manifest's transforms.

    Raises:
        StageError: As Adapter does, and non_finite.
    """
    adapter = Adapter(folder, base)
    changed = {*adapter.pairs, *adapter.replaced}
    paths = sorted({base.files[name] for name in changed})
    for path in tqdm(paths, desc="merging the adapter", unit="file", disable=None):
        names = sorted(name for name, file in base.files.items() if file == path)
        written = target / path.relative_to(base.folder)
        written.unlink(missing_ok=True)  # the link; otherwise the source itself would change
        with SafetensorsWriter(written, names) as writer:
            for name in names:
                tensor = base.raw(name)
                if name in changed:
                    tensor = adapter.merged(name, tensor)
                writer.add(base.keys[name], base.as_stored(name, tensor))
    recorded = {key: adapter.config.get(key) for key in RECORDED}
    return {
        "step": "merge_lora",
        "adapter": str(folder),
        **recorded,
        "tensors": len(changed),
    }
