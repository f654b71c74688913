"""One model with its texts, and the KL divergence that quantized weights cost it."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.calibration import calibrate
from benchmarks.paths import DEMO_DATA, DEMO_MODEL
from benchmarks.stopwatch import stopwatch
from quantline.calibration.store import CalibrationStore
from quantline.config.recipes import parse_recipe
from quantline.methods.ggml.block_types import dequantize_blocks
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.quantized.store import QuantizedModel
from quantline.recipes.quantize import quantize_model
from quantline.text.documents import Document
from quantline.text.tokenizer import Tokenizer

TEXTS = ("evaluation", "evaluation-code", "evaluation-dialogue")  # news, code, dialogue
LENGTH = 256  # of a sequence of these
SEQUENCES_AT_ONCE = 8  # of the evaluation text


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is measured, and on which texts."""
    calibration = DEMO_DATA / "calibration.txt"
    evaluation = DEMO_DATA / "evaluation.txt"
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--calibration", type=Path, default=calibration)
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[evaluation], help="one text or several"
    )
    parser.add_argument(
        "--sequences",
        type=int,
        nargs=2,
        default=[128, 100],
        help="of calibration, and of each evaluation text",
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")


def read_paragraphs(path: Path) -> list[Document]:
    """Return the paragraphs of a text file, which are its documents."""
    text = path.read_text(encoding="utf-8")
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


class ModelUnderTest:
    """A model in float32, and its distributions on evaluation texts.

    Attributes:
        checkpoint: The unquantized model.
        draws: Neighbouring parts of the calibration text, int32 [sequences, length] each.
        calibration: The draw to calibrate on, at first the first one.
        evaluation: int32 [sequences, length], of one text after another.
        tokens_of: Evaluation text → how many tokens of it there are.
        model: The model of transformers, whose weights are replaced for a while.
        reference: The unquantized model's log-probabilities [sequences, length, vocabulary].
    """

    def __init__(
        self,
        folder: Path,
        calibration: Path,
        evaluation: Iterable[Path],
        sequences: tuple[int, int],
        length: int,
        draws: int = 1,
    ) -> None:
        """Read the model and the texts, and run the model on the evaluation texts.

        Args:
            folder: Of the checkpoint.
            calibration: A text file; documents are separated by blank lines.
            evaluation: Others. If one is the same, calibration has its first half.
            sequences: How many of calibration, and of each evaluation text.
            length: Tokens of a sequence.
            draws: Parts of the calibration text, each of so many sequences.
        """
        self.checkpoint = Checkpoint(folder)
        tokenizer = Tokenizer(folder)
        calibration_text = read_paragraphs(calibration)
        texts = {path: read_paragraphs(path) for path in evaluation}
        if calibration in texts:
            half = len(calibration_text) // 2
            calibration_text = calibration_text[:half]
            texts[calibration] = texts[calibration][half:]
        calibration_count, evaluation_count = sequences
        drawn = tokenizer.pack(calibration_text, draws * calibration_count, length)
        packed = {
            path.stem: tokenizer.pack(text, evaluation_count, length)
            for path, text in texts.items()
        }
        self.evaluation = np.concatenate(list(packed.values()))
        self.tokens_of = {name: int(tokens.size) for name, tokens in packed.items()}
        if len(drawn) < draws * calibration_count:
            raise SystemExit(
                f"expected {draws * calibration_count} sequences of calibration text, found "
                f"{len(drawn)}; take fewer draws"
            )
        self.draws = np.split(drawn, draws)
        self.calibration = self.draws[0]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.eval().to(device())
        self._original = {
            name: value.detach().clone() for name, value in self.model.named_parameters()
        }
        self.reference = self.logprobs()

    @classmethod
    def of_options(cls, options: argparse.Namespace, draws: int = 1) -> "ModelUnderTest":
        """Open the model that `add_model_options` asked for."""
        return cls(
            options.model,
            options.calibration,
            options.evaluation,
            tuple(options.sequences),
            options.length,
            draws,
        )

    @classmethod
    def of_folder(cls, folder: Path, sequences: tuple[int, int]) -> "ModelUnderTest":
        """Return the model and the texts that benchmarks.real_models has made in a folder.

        Args:
            folder: That folder.
            sequences: How many of calibration, and of each of TEXTS.
        """
        texts = [folder / f"{name}.txt" for name in TEXTS]
        return cls(folder / "model", folder / "calibration.txt", texts, sequences, LENGTH)

    @property
    def name(self) -> str:
        """The name of the model's folder after that of the folder it lies in."""
        folder = self.checkpoint.folder.resolve()
        return f"{folder.parent.name}-{folder.name}"

    @torch.inference_mode()
    def logprobs(self) -> torch.Tensor:
        """Return log-probabilities [sequences, length, vocabulary] on the evaluation text.

        They are those of the weights that the model has now.
        """
        return torch.cat([part.cpu() for part in self._parts()])

    def _parts(self) -> Iterator[torch.Tensor]:
        """Yield log-probabilities [SEQUENCES_AT_ONCE, length, vocabulary] on the device."""
        for batch in torch.from_numpy(self.evaluation).split(SEQUENCES_AT_ONCE):
            yield torch.log_softmax(self.model(batch.long().to(device())).logits, -1)

    @torch.inference_mode()
    def token_divergences(self, logprobs: Iterable[torch.Tensor] | None = None) -> torch.Tensor:
        """Return the KL divergence from the unquantized model at each token, float64 [tokens].

        Args:
            logprobs: Parts of SEQUENCES_AT_ONCE sequences; by default those of the weights that
                the model has now, of which only one is in memory at a time.
        """
        found = []
        parts = self.reference.split(SEQUENCES_AT_ONCE)
        for reference, part in zip(parts, logprobs or self._parts(), strict=True):
            expected = reference.to(part.device)
            products = expected.exp() * (expected - part)
            found.append(products.sum(-1, dtype=torch.float64).reshape(-1).cpu())
        return torch.cat(found)

    def divergence(self, logprobs: torch.Tensor) -> dict[str, Any]:
        """Return the mean KL divergence of some log-probabilities, as `figures` does."""
        return self.figures(self.token_divergences(logprobs.split(SEQUENCES_AT_ONCE)))

    def figures(self, values: torch.Tensor) -> dict[str, Any]:
        """Return mean `kld` and standard error `se` of values [tokens], in `texts` by text."""
        of_texts = zip(self.tokens_of, values.split(list(self.tokens_of.values())), strict=True)
        return mean_and_error(values) | {
            "texts": {name: mean_and_error(part) for name, part in of_texts}
        }

    def calibrate(self, folder: Path, gradients: bool) -> dict[str, float]:
        """Calibrate on the present draw into a new folder; return the seconds that it takes."""
        with stopwatch() as times:
            calibrate(self.checkpoint, self.calibration, folder, gradients)
        return times

    def quantize(
        self, options: dict[str, Any], calibration: Path, folder: Path
    ) -> dict[str, float]:
        """Quantize the model into a folder; return the seconds that it takes.

        Args:
            options: Of the recipe.
            calibration: A folder that `calibrate` made.
            folder: Where to write.
        """
        with stopwatch() as times:
            store = CalibrationStore(calibration)
            recipe = parse_recipe(options)
            quantize_model("benchmark", recipe, self.checkpoint, store, folder)
        return times

    @contextmanager
    def quantized_weights(self, folder: Path) -> Iterator[QuantizedModel]:
        """Give the model the weights of a quantized one, and its own ones back afterwards.

        Args:
            folder: Of the quantized model.
        """
        quantized = QuantizedModel(folder)
        self._set_weights(_dequantized(quantized))
        yield quantized
        self._set_weights(self._original.items())

    @torch.no_grad()
    def _set_weights(self, weights: Any) -> None:
        """Copy pairs of a parameter's name and its values into the model."""
        parameters = dict(self.model.named_parameters())
        for name, values in weights:
            parameters[name].copy_(values.reshape(parameters[name].shape))

    def quantized_divergence(self, folder: Path) -> dict[str, Any]:
        """Return the mean KL divergence of a quantized model, as `figures` does."""
        with self.quantized_weights(folder):
            return self.figures(self.token_divergences())


def _dequantized(quantized: QuantizedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the values of every tensor that differs from the source's."""
    for name in quantized.ggml_names:
        blocks = quantized.ggml_blocks(name)
        yield name, torch.from_numpy(np.float32(dequantize_blocks(blocks.data, blocks.type)))
    for name in quantized.linears:
        yield f"{name}.weight", torch.from_numpy(quantized.linear(name).dequantize())
    for name in quantized.overrides:
        yield name, torch.from_numpy(quantized.override(name))


def mean_and_error(values: torch.Tensor) -> dict[str, float]:
    """Return the mean of values [n] as `kld`, and its standard error as `se`."""
    error = values.std() / len(values) ** 0.5
    return {"kld": float(values.mean()), "se": float(error)}
