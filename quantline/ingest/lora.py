"""Merging a PEFT LoRA adapter into a checkpoint, tensor by tensor.

W + (alpha / r) B A (Hu et al. 2021, section 4.1); with rank-stabilized LoRA the factor is alpha / sqrt(r) (Kalajdzievski
2023); DoRA scales each row of the sum to a learned norm (Liu et al. 2024, equation 5). Modules that were trained whole
(`modules_to_save`, biases) take the place of the base's.
"""

import math
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from quantline.model.architecture import architecture
from quantline.model.checkpoint import Checkpoint, inside, read_json
from quantline.model.safetensors_writer import SafetensorsStream
from quantline.errors import Failure, StageError

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
PARTS = {".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_magnitude_vector": "norm",
         ".lora_magnitude_vector.weight": "norm"}
REFUSED = ("fan_in_fan_out", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
           "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config", "monteclora_config", "arrow_config")
# Other initializations (PiSSA, OLoRA, CorDA, LoftQ, …) change the base too, so W + BA is not what was trained.
BASE_UNTOUCHED = (None, True, False, "gaussian", "eva", "orthogonal")


class Adapter:
    """An adapter folder, checked against what it is to be merged into.

    Raises StageError: adapter_mismatch, unsafe_checkpoint, missing_file, path_escape.
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self.folder, self.config = folder, read_json(inside(folder, CONFIG))
        self.path = inside(folder, WEIGHTS)
        if not self.path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise StageError(Failure.UNSAFE_CHECKPOINT if pickled else Failure.MISSING_FILE,
                             f"expected {WEIGHTS} in {folder}, found {'only a pickle' if pickled else 'none'}; "
                             "save the adapter as safetensors")
        if self.config.get("peft_type") != "LORA":
            raise self.mismatch(f"peft_type LORA, found {self.config.get('peft_type')}")
        odd = [key for key in REFUSED if self.config.get(key)]
        if self.config.get("init_lora_weights") not in BASE_UNTOUCHED:
            odd.append(f"init_lora_weights={self.config['init_lora_weights']}")
        if odd:
            raise self.mismatch(f"LoRA without {', '.join(odd)}; merge this one with peft first")
        self.pairs: dict[str, dict[str, str]] = {}  # base tensor → part → key in the adapter's file
        self.whole: dict[str, str] = {}  # base tensor → key of what takes its place
        try:
            with safe_open(self.path, "np") as file:
                self.keys = sorted(file.keys())
        except SafetensorError as error:
            raise self.mismatch(f"a readable {WEIGHTS}, found a damaged one ({error})") from None
        for key in self.keys:
            self._place(key, base)
        for name, parts in self.pairs.items():
            needed = {"down", "up", "norm"} if self.config.get("use_dora") else {"down", "up"}
            if set(parts) != needed:
                raise self.mismatch(f"{', '.join(sorted(needed))} for {name}, found {', '.join(sorted(parts))}")
        if not self.pairs and not self.whole:
            raise self.mismatch("at least one tensor, found none")

    def _place(self, key: str, base: Checkpoint) -> None:
        """Find what a tensor of the adapter belongs to."""
        name = key.removeprefix(PREFIX)
        for suffix, part in PARTS.items():
            if name.endswith(suffix):
                target = name.removesuffix(suffix) + ".weight"
                self.pairs.setdefault(target, {})[part] = key
                break
        else:
            target = name
            self.whole[target] = key
        shared = base.tied_head is not None and target in (base.tied_head, architecture(base).embedding)
        if target not in base.names or shared:
            found = "which the base ties to its other end" if shared else "which the base does not have"
            raise self.mismatch(f"only changes to tensors of the base, found {key}, {found}")

    def mismatch(self, expected: str) -> StageError:
        return StageError(Failure.ADAPTER_MISMATCH, f"expected in the adapter {self.folder} {expected}")

    def factor(self, name: str, rank: int) -> float:
        """What B A is multiplied by. Patterns are regular expressions for the end of a module's name, as in peft."""
        module = name.removesuffix(".weight")

        def setting(patterns: dict | None, otherwise: float) -> float:
            hits = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
            return next(hits, otherwise)

        expected = setting(self.config.get("rank_pattern"), self.config["r"])
        if rank != expected:
            raise self.mismatch(f"rank {expected} for {module}, found {rank}")
        alpha = setting(self.config.get("alpha_pattern"), self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def merged(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """The base's tensor with the adapter in it, computed in float32, in the base's dtype."""
        with safe_open(self.path, "np") as file:
            def read(key: str) -> np.ndarray:
                return file.get_tensor(key).astype(np.float32)

            if name in self.whole:
                result = read(self.whole[name])
            else:
                parts = self.pairs[name]
                down, up = read(parts["down"]), read(parts["up"])
                if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != tensor.shape \
                        or up.shape[1] != down.shape[0]:
                    raise self.mismatch(f"B A of shape {tensor.shape} for {name}, found {up.shape} times {down.shape}")
                result = tensor.astype(np.float32) + np.float32(self.factor(name, len(down))) * (up @ down)
                if "norm" in parts:
                    result *= (read(parts["norm"]).reshape(-1) / np.linalg.norm(result, axis=1))[:, None]
        if result.shape != tensor.shape:
            raise self.mismatch(f"{name} of shape {tensor.shape}, found {result.shape}")
        result = result.astype(tensor.dtype)
        if not np.isfinite(result).all():
            raise StageError(Failure.NON_FINITE, f"expected a finite {name} after merging {self.folder}, found NaN or "
                                                 "infinity; the adapter's training broke")
        return result


def merge(base: Checkpoint, folder: Path, target: Path) -> dict:
    """Write the files of `base` that the adapter changes into `target`, anew; returns the step for the transforms.

    Files without changed tensors stay as they are there. One tensor is in memory at a time.
    Raises StageError as Adapter does, and non_finite.
    """
    adapter = Adapter(folder, base)
    changed = sorted({*adapter.pairs, *adapter.whole})
    for path in tqdm(sorted({base.files[name] for name in changed}), desc="merging the adapter", unit="file",
                     disable=None):
        names = sorted(name for name, file in base.files.items() if file == path)
        written = target / path.relative_to(base.folder)
        written.unlink(missing_ok=True)  # the link, or the source itself would change
        with SafetensorsStream(written, names) as stream:
            for name in names:
                tensor = base.raw(name)
                merged = adapter.merged(name, tensor) if name in changed else tensor
                stream.add(base.keys[name], base.as_stored(name, merged))
    about = {key: adapter.config.get(key) for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern",
                                                      "alpha_pattern")}
    return {"step": "merge_lora", "adapter": str(folder), **about, "tensors": len(changed)}
