"""The calibration of a model on a text: tokens, and statistics of every linear layer."""

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from quantline.calibration.embedding_and_head import TOKENS
from quantline.calibration.expert_coverage import coverage_figures, expert_coverage
from quantline.calibration.store import INFO, effective_tokens
from quantline.config.executor import Executor
from quantline.config.texts import Calibration
from quantline.files import read_json, versions, write_json, write_tensors
from quantline.messages import say
from quantline.model.checkpoint import Checkpoint
from quantline.model.positions import check_length
from quantline.text.documents import pin_revision, read_documents, sha256_documents
from quantline.text.tokenizer import Tokenizer

PACKAGES = ("torch", "transformers", "tokenizers")


class CalibrationRun:
    """One calibration: a model, a text and a seed.

    Attributes:
        text: The text, with a Hub dataset's revision pinned to a commit.
        tokens: int32 [sequences, length].
    """

    def __init__(self, checkpoint: Checkpoint, text: Calibration, seed: int) -> None:
        """Read and tokenize the text.

        Raises:
            StageError: dataset_invalid, network_unavailable, calibration_empty, config_invalid.
        """
        check_length(checkpoint.arch, "calibration.length", text.length)
        self.checkpoint = checkpoint
        self.text = pin_revision(text)
        self.seed = seed
        self.documents = read_documents(self.text)
        tokenizer = Tokenizer(checkpoint.folder)
        self.tokens = tokenizer.pack(self.documents, self.text.sequences, self.text.length)

    @cached_property
    def text_sha256(self) -> str:
        """The sha256 over the documents."""
        return sha256_documents(self.documents)

    def inputs_key(self) -> dict[str, Any]:
        """Return all that the statistics depend on, besides the code."""
        return {
            "text": self.text_sha256,
            "calibration": self.text.model_dump(mode="json"),
            "seed": self.seed,
            "model": self.checkpoint.stamp(),
            "versions": versions(*PACKAGES),
        }

    def collect(self, folder: Path, executor: Executor | None = None) -> dict[str, Any]:
        """Write tokens, statistics and calibration.json; return the content of the latter.

        calibration.json comes last. If it is there, an earlier run was killed after the work.

        Args:
            folder: Where to write.
            executor: Who works; None is this process.

        Raises:
            StageError: non_finite, calibration_empty; as `run_items` does.
        """
        from quantline.calibration.collect import remove_progress
        from quantline.calibration.parts import remove_parts

        if (folder / INFO).is_file():
            remove_progress(folder)
            remove_parts(folder)
            return read_json(folder / INFO)
        weighted = self.text.by_gradient
        layers = self._layers(folder, executor)
        info = {
            "text_sha256": self.text_sha256,
            "text": self.text.path or self.text.dataset,
            "dataset_revision": self.text.dataset_revision,
            "tokens": int(self.tokens.size),
            "sequences": len(self.tokens),
            "length": self.text.length,
            "seed": self.seed,
            "curvature": self.text.curvature,
            "weights": "gradient" if weighted else "equal",
            "effective_tokens": effective_tokens(folder, layers) if weighted else None,
            "layers": layers,
            "experts": expert_coverage(self.checkpoint.arch, layers),
            "versions": versions(*PACKAGES),
        }
        write_tensors(folder / TOKENS, {"tokens": self.tokens})
        write_json(folder / INFO, info)
        remove_progress(folder)
        remove_parts(folder)
        return info

    def _layers(self, folder: Path, executor: Executor | None) -> dict[str, dict[str, Any]]:
        """Write the statistics; return what was seen of each layer.

        What a run of the other kind, by workers or not, has left in the folder is of no use.
        """
        from quantline.calibration.collect import PROGRESS, collect_statistics
        from quantline.calibration.parts import FOLDER, collect_by_workers

        seed = self.seed if self.text.curvature else None
        divided = executor is not None and executor.divides
        if divided and self.checkpoint.arch.expert_linears():
            say(
                "calibrate: one process does all of it, since whether an expert saw too few tokens "
                "is known of the whole text only"
            )
            divided = False
        of_other_kind = folder / (PROGRESS if divided else FOLDER)
        if of_other_kind.exists():
            # What tells of it goes last, for a run that is killed here.
            for path in sorted(folder.iterdir(), key=lambda path: path == of_other_kind):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        arguments = (self.checkpoint, self.tokens, folder, seed, self.text.by_gradient)
        if divided and executor:
            return collect_by_workers(*arguments, executor)
        return collect_statistics(*arguments)

    def summary(self, info: dict[str, Any], size_bytes: int) -> str:
        """Describe the calibration in one line."""
        layers = info["layers"]
        parts = [f"{info['tokens']} tokens"]
        if info["sequences"] < self.text.sequences:
            filled = f"{info['sequences']} of {self.text.sequences}"
            parts[0] += f" (the text fills {filled} sequences)"
        coverage = coverage_figures(info["experts"])
        if coverage:
            parts.append(
                f"{coverage['experts_starved']} of {coverage['experts']} experts undercalibrated "
                "(calibrated on all tokens)"
            )
        inputs = {entry["moments"] for entry in layers.values()}
        gradients = " and of their output gradients" if info["curvature"] else ""
        if info["effective_tokens"]:
            counted = info["effective_tokens"]
            parts[0] += (
                f" (counted by their gradients, they are as good as {counted['median']} alike, in "
                f"one layer {counted['fewest']})"
            )
        parts.append(f"second moments of {len(inputs)} inputs of {len(layers)} layers{gradients}")
        parts.append(f"{size_bytes / 2**20:.1f} MiB")
        return ", ".join(parts)
