"""Merging a PEFT LoRA adapter into a checkpoint, tensor by tensor.

W + (alpha / r) B A (Hu et al. 2021, section 4.1); with rank-stabilized LoRA the scaling is
alpha / sqrt(r) (Kalajdzievski 2023); DoRA scales each row of the sum to a learned norm (Liu et al.
2024, equation 5). Modules that were trained whole (`modules_to_save`, biases) replace the base's,
and so do single rows of an embedding (`trainable_token_indices`). What peft stores of base layers
that did not change is left out.

Weights are [out, in] here, whatever the order of their file, so that peft's `fan_in_fan_out`, which
says that a file has them the other way, makes no difference.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from quantline.errors import Failure, StageError, reading_foreign
from quantline.ingest.adapter_config import (
    CONFIG,
    MERGE_FIRST,
    NAME_BASE,
    SAVE_AGAIN,
    AdapterConfig,
)
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import inside
from quantline.model.safetensors_writer import SafetensorsWriter

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "merge"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# End of a key → (the part it is, the end of the base tensor that it belongs to).
PARTS = {
    ".lora_A.weight": ("down", ".weight"),
    ".lora_B.weight": ("up", ".weight"),
    ".lora_embedding_A": ("down", ".weight"),
    ".lora_embedding_B": ("up", ".weight"),
    ".lora_magnitude_vector": ("norm", ".weight"),
    ".lora_magnitude_vector.weight": ("norm", ".weight"),
    ".token_adapter.trainable_tokens_delta": ("rows", ".weight"),
    ".lora_B.bias": ("shift", ".bias"),
    ".base_layer.weight": ("copy", ".weight"),
    ".base_layer.bias": ("whole", ".bias"),
}
UNTIE = (
    "untie the base first: store its head on its own, with tie_word_embeddings false in config.json"
)
RECORDED = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


class Adapter:
    """An adapter folder, checked against the base that it is to be merged into.

    Attributes:
        config: Its options.
        parts: Base tensor → part → key in the adapter's file. "down" and "up" are A and B, "norm"
            is DoRA's, "rows" are single rows, "shift" is added to a bias, "whole" replaces the
            tensor.

    Raises:
        StageError: adapter_mismatch, unsafe_checkpoint, missing_file, path_escape.
    """

    @reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter as peft saves it")
    def __init__(self, folder: Path, base: Checkpoint) -> None:
        """Read the adapter's configuration and the names of its tensors."""
        self.folder = folder
        self.base = base
        self.config = AdapterConfig(folder)
        self.path = inside(folder, WEIGHTS)
        if not self.path.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            raise StageError(
                Failure.UNSAFE_CHECKPOINT if pickled else Failure.MISSING_FILE,
                f"expected {WEIGHTS} in {folder}, found {'only a pickle' if pickled else 'none'}; "
                "save the adapter as safetensors",
            )
        self.parts: dict[str, dict[str, str]] = {}
        self.embeddings: set[str] = set()
        self.read_keys: list[str] = []
        try:
            with safe_open(self.path, "np") as file:
                self.read_keys = sorted(file.keys())
        except SafetensorError as error:
            raise self.config.mismatch(
                f"a readable {WEIGHTS}, found a damaged one ({error})", SAVE_AGAIN
            ) from None
        if not self.read_keys:
            raise self.config.mismatch("at least one tensor, found none", SAVE_AGAIN)
        for key in self.read_keys:
            self._assign(key)
        self._leave_out_copies()
        self._check_tied()
        for name, parts in self.parts.items():
            self._check_parts(name, parts)

    def _assign(self, key: str) -> None:
        """Find the base tensor that a tensor of the adapter belongs to."""
        name = key.removeprefix(PREFIX)
        part = "whole"
        target = name
        for suffix, (kind, ending) in PARTS.items():
            if name.endswith(suffix):
                part = kind
                target = name.removesuffix(suffix) + ending
                break
        target = self._base_name(target)
        if target not in self.base.names and target != self.base.tied_head:
            if self.config.values.get("target_parameters"):
                raise self.config.mismatch(
                    f"LoRA of layers of their own, found {key} (target_parameters), which changes "
                    "a stack of experts",
                    MERGE_FIRST,
                )
            raise self.config.mismatch(
                f"only changes to tensors of the base, found {key}, which the base does not have",
                NAME_BASE,
            )
        if ".lora_embedding_" in key:
            self.embeddings.add(target)
        self.parts.setdefault(target, {})[part] = key

    def _base_name(self, target: str) -> str:
        """Return the checkpoint's name for a tensor, which transformers may call otherwise."""
        family = self.base.family
        if target in self.base.names or family is None:
            return target
        names = [family.renamed.get(name, name) for name in target.split(".")]
        renamed = ".".join(names)
        return renamed if renamed in self.base.names else target

    def _read(self, key: str) -> np.ndarray:
        try:
            with safe_open(self.path, "np") as file:
                return file.get_tensor(key)
        except (SafetensorError, TypeError) as error:  # numpy lacks some number types
            raise self.config.mismatch(
                f"{key} as a tensor of floats, found {error}", SAVE_AGAIN
            ) from None

    def _is_copy(self, target: str, key: str) -> bool:
        """Whether a tensor of the adapter is the base's own, in the number type of either."""
        stored = self._read(key)
        own = self._own(target)
        if stored.shape != own.shape:
            return False
        one_way = np.array_equal(stored.astype(own.dtype), own)
        return one_way or np.array_equal(own.astype(stored.dtype), stored)

    def _own(self, target: str) -> np.ndarray:
        """Return a tensor of the base; for a head that is the embedding, the embedding."""
        tied = target == self.base.tied_head
        return self.base.raw(self.base.arch.embedding if tied else target)

    def _leave_out_copies(self) -> None:
        """Drop what peft stores of layers that did not change.

        Beside A and B it stores the layer under them, which was not trained, and with
        `save_embedding_layers` the embedding and the head, whether they were or not.
        """
        for target, parts in list(self.parts.items()):
            if "copy" in parts:
                if not self._is_copy(target, parts["copy"]):
                    raise self.config.mismatch(
                        f"the base's own {target} under LoRA's matrices, found another one of "
                        f"shape {self._read(parts['copy']).shape}",
                        NAME_BASE,
                    )
                del parts["copy"]
            around = (self.base.arch.embedding, self.base.arch.head, self.base.tied_head)
            if "whole" in parts and target in around and self._is_copy(target, parts["whole"]):
                del parts["whole"]
            if not parts:
                del self.parts[target]

    def _check_tied(self) -> None:
        """Refuse changes of a head or an embedding alone, where the base has one tensor for both.

        Single rows are an exception: peft trains them for both.
        """
        head = self.base.tied_head
        if head is None:
            return
        embedding = self.base.arch.embedding
        both = [self.parts.get(name, {}) for name in (embedding, head)]
        if set(both[0]) == set(both[1]) == {"whole"}:
            first, second = (self._read(parts["whole"]) for parts in both)
            if np.array_equal(first, second):
                del self.parts[head]
                return
        shared = self.config.values.get("ensure_weight_tying") and set(both[0]) == {"whole"}
        if set(both[0]) <= {"rows"} or shared:
            both[0] = {}
        keys = [key for parts in both for key in parts.values()]
        if keys:
            raise self.config.mismatch(
                "only changes to tensors that the base does not share between embedding and head, "
                f"found {keys[0]}",
                UNTIE,
            )

    def _check_parts(self, name: str, parts: dict[str, str]) -> None:
        """Refuse half a change, and two that exclude each other."""
        pair = {"down", "up"}
        if self.config.values.get("use_dora"):
            pair.add("norm")
            if name in self.embeddings:
                raise self.config.mismatch(f"no DoRA of an embedding, found {name}", MERGE_FIRST)
        found = set(parts)
        if found in ({"whole"}, {"rows"}, {"shift"}, {"whole", "shift"}, pair):
            return
        wanted = ", ".join(sorted(pair))
        raise self.config.mismatch(
            f"{wanted} for {name}, found {', '.join(sorted(parts))}", SAVE_AGAIN
        )

    @reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter as peft saves it")
    def merged(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor of the base with the adapter in it.

        It is computed in float32 and returned in the base's dtype.

        Raises:
            StageError: adapter_mismatch, non_finite.
        """
        parts = {}
        for part, key in self.parts[name].items():
            parts[part] = self._read(key).astype(np.float32)
        result = parts["whole"] if "whole" in parts else tensor.astype(np.float32)
        if result.shape != tensor.shape:
            grown = " (its vocabulary was resized)" if name == self.base.arch.embedding else ""
            raise self.config.mismatch(
                f"{name} of shape {tensor.shape}, found {result.shape}{grown}", NAME_BASE
            )
        if "down" in parts:
            result = self._add(name, result, parts)
        if "rows" in parts:
            result = self._replace_rows(name, result, parts["rows"])
        if "shift" in parts:
            result = self._shift(name, result, parts["shift"])
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
        outer = (up.shape[0], down.shape[-1])
        if name in self.embeddings:  # B A is [width, tokens] there
            outer = outer[::-1]
        fit = matrices and outer == tensor.shape
        if not fit or up.shape[1] != down.shape[0]:
            raise self.config.mismatch(
                f"B A of shape {tensor.shape} for {name}, found {up.shape} times {down.shape}",
                NAME_BASE,
            )
        scaling = np.float32(self.config.scaling(name.removesuffix(".weight"), len(down)))
        change = up @ down
        result = tensor + scaling * (change.T if name in self.embeddings else change)
        if "norm" in parts:
            norms = np.linalg.norm(result, axis=1)
            wanted = parts["norm"].reshape(-1)
            if wanted.shape != norms.shape:
                raise self.config.mismatch(
                    f"{len(norms)} norms for {name}, found {len(wanted)}", NAME_BASE
                )
            result = result * (wanted / norms)[:, None]
        return result

    def _replace_rows(self, name: str, tensor: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return an embedding with the rows that were trained on their own."""
        numbers = self.config.trained_rows(name.removesuffix(".weight"))
        width = tensor.shape[1]
        if rows.shape != (len(numbers), width) or not max(numbers, default=0) < len(tensor):
            raise self.config.mismatch(
                f"{len(numbers)} rows of {width} numbers among the {len(tensor)} of {name}, found "
                f"{rows.shape} up to token {max(numbers, default=0)}",
                NAME_BASE,
            )
        result = tensor.copy()
        result[numbers] = rows
        return result

    def _shift(self, name: str, bias: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Return a bias with that of B, which is scaled as B A is."""
        module = name.removesuffix(".bias")
        parts = self.parts.get(f"{module}.weight", {})
        if "down" not in parts or shift.shape != bias.shape:
            raise self.config.mismatch(
                f"a bias of shape {bias.shape} beside A and B of {module}, found {shift.shape}",
                NAME_BASE,
            )
        scaling = self.config.scaling(module, len(self._read(parts["down"])))
        return bias + np.float32(scaling) * shift


def merge(base: Checkpoint, folder: Path, target: Path) -> dict[str, Any]:
    """Write the files of `base` that the adapter changes into `target`, anew.

    Files without changed tensors stay as they are there. One tensor is in memory at a time.

    Returns:
        The step for the manifest's transforms.

    Raises:
        StageError: As Adapter does, and non_finite.
    """
    adapter = Adapter(folder, base)
    changed = set(adapter.parts)
    embedding = base.arch.embedding
    # A second copy of a tied head changes with the embedding.
    copies = {base.tied_head: embedding} if base.tied_head and embedding in changed else {}
    written_names = changed | (set(copies) & set(base.files))
    paths = sorted({base.files[name] for name in written_names})
    for path in tqdm(paths, desc="merging the adapter", unit="file", disable=None):
        names = sorted(name for name, file in base.files.items() if file == path)
        written = target / path.relative_to(base.folder)
        written.unlink(missing_ok=True)  # the link; otherwise the source itself would change
        with SafetensorsWriter(written, names) as writer:
            for name in names:
                original = copies.get(name, name)
                tensor = base.raw(original)
                if original in changed:
                    tensor = adapter.merged(original, tensor)
                writer.add(base.keys[name], base.as_stored(name, tensor))
    recorded = {key: adapter.config.values.get(key) for key in RECORDED}
    return {
        "step": "merge_lora",
        "adapter": str(folder),
        **recorded,
        "tensors": len(changed),
    }
