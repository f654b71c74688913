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

from quantline.causes import reading_foreign
from quantline.errors import Failure, StageError
from quantline.ingest.adapter_config import CONFIG, NAME_BASE
from quantline.ingest.adapter_tensors import WEIGHTS, AdapterTensors
from quantline.model.checkpoint import Checkpoint
from quantline.model.safetensors_writer import SafetensorsWriter
from quantline.run.progress import progress

__all__ = ["CONFIG", "WEIGHTS", "Adapter", "merge"]

RECORDED = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


class Adapter(AdapterTensors):
    """An adapter folder that fits a base, and what it makes of the base's tensors.

    Raises:
        StageError: As AdapterTensors does.
    """

    @reading_foreign(Failure.ADAPTER_MISMATCH, "an adapter as peft saves it")
    def merged(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Return a tensor of the base with the adapter in it.

        It is computed in float32 and returned in the base's dtype.

        Raises:
            StageError: adapter_mismatch, non_finite.
        """
        parts = {}
        for part, key in self.parts[name].items():
            parts[part] = self.read(key).astype(np.float32)
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
        scaling = self.config.scaling(module, len(self.read(parts["down"])))
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
    for path in progress(paths, "merging the adapter", "file"):
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
