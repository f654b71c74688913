"""The tensors of a PEFT LoRA adapter: what each changes of the base, and whether that fits."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from quantline.causes import reading_foreign
from quantline.errors import Failure, StageError
from quantline.ingest.adapter_config import MERGE_FIRST, NAME_BASE, SAVE_AGAIN, AdapterConfig
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import inside

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


class AdapterTensors:
    """The tensors of an adapter folder, checked against the base that they are to be merged into.

    Attributes:
        folder: The adapter.
        base: What it changes.
        config: Its options.
        parts: Base tensor → part → key in the adapter's file. "down" and "up" are A and B, "norm"
            is DoRA's, "rows" are single rows, "shift" is added to a bias, "whole" replaces the
            tensor.
        embeddings: The base tensors that are embeddings to LoRA, whose A and B are the other way.

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
        try:
            with safe_open(self.path, "np") as file:
                keys = sorted(file.keys())
        except SafetensorError as error:
            raise self.config.mismatch(
                f"a readable {WEIGHTS}, found a damaged one ({error})", SAVE_AGAIN
            ) from None
        if not keys:
            raise self.config.mismatch("at least one tensor, found none", SAVE_AGAIN)
        for key in keys:
            self._assign(key)
        self._leave_out_copies()
        self._check_tied()
        for name, parts in self.parts.items():
            self._check_parts(name, parts)

    def read(self, key: str) -> np.ndarray:
        """Return a tensor of the adapter, as it is stored. Raises StageError: adapter_mismatch."""
        try:
            with safe_open(self.path, "np") as file:
                return file.get_tensor(key)
        except (SafetensorError, TypeError) as error:  # numpy lacks some number types
            raise self.config.mismatch(
                f"{key} as a tensor of floats, found {error}", SAVE_AGAIN
            ) from None

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
        if target in (*self.base.names, self.base.tied_head):
            return target
        if self.base.structure is not None:
            return self.base.structure.names_of_paths.get(target, target)
        if family is None:
            return target
        names = [family.renamed.get(name, name) for name in target.split(".")]
        renamed = ".".join(names)
        return renamed if renamed in self.base.names else target

    def _is_copy(self, target: str, key: str) -> bool:
        """Whether a tensor of the adapter is the base's own, in the number type of either."""
        stored = self.read(key)
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
                        f"shape {self.read(parts['copy']).shape}",
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
            first, second = (self.read(parts["whole"]) for parts in both)
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
