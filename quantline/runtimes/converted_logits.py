"""A converter's file held against the checkpoint: the logits of both on the same tokens.

A converter may take a model for another one, or miss a setting, and still write a file that
llama.cpp loads. So no bundle is made of a file whose logits are not the checkpoint's. llama.cpp
rounds what a matrix is multiplied with to the matrix's own type; to see the converter alone, the
file is widened to float32 for the comparison, where there is room for it.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantline.config.texts import Limits
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.run.child_process import call_in_child
from quantline.run.memory import available_bytes

if TYPE_CHECKING:
    from quantline.model.gguf_checkpoint import GgufCheckpoint

SEQUENCES = 2
LENGTH = 48
SEED = 0
# How the keys of config.json end that name tokens.
TOKEN_KEYS = ("token_id", "token_ids", "token_index", "token_idx", "patch_id")
# Type of the matrices that are compared → the mean KL divergence in nats, and the error as a share
# of the logits' own spread, that rounding may make. float32 leaves a tenth of them at most, for
# llama.cpp has tables of activation functions in float16.
MOST = {"F32": (1e-5, 3e-3), "F16": (1e-2, 0.05), "BF16": (2e-2, 0.1)}


def check_logits(converted: "GgufCheckpoint", limits: Limits, threads: int | None) -> None:
    """Hold a converter's file against the checkpoint, once for all bundles that are made of it.

    Args:
        converted: The file, in whose folder the figures are kept.
        limits: Of the process that compares.
        threads: Of both runtimes; None is one per core.

    Raises:
        StageError: converter_failed, if the logits differ; what the process ends with.
    """
    path = converted.figures
    if not path.is_file():
        arguments = {"folder": str(converted.folder), "threads": threads}
        label = "the comparison of the converter's file with the checkpoint"
        try:
            figures = call_in_child(f"{__name__}:compare", arguments, limits, label)
        except StageError as error:
            if error.failure != Failure.RUNTIME_CRASHED:
                raise
            raise _wrong("a file that llama.cpp runs", str(error)) from None
        write_json(path, figures)
    figures = read_json(path)
    if not figures["finite"]:
        raise _wrong("a file with the logits of the checkpoint", "NaN or infinity")
    if not agree(figures):
        divergence, share = MOST[figures["dtype"]]
        taken = converted.step.get("taken_for")
        raise _wrong(
            f"a file with the logits of the checkpoint (within {share:.1%} of their spread, and a "
            f"mean KL divergence of {divergence:g})",
            f"one that llama.cpp computes another model from ({figures['relative_error']:.1%} and "
            f"{figures['mean_kld']:.2g}{f'; it knows the class only as {taken}' if taken else ''})",
        )


def compare(folder: str, threads: int | None = None) -> dict[str, Any]:
    """Compare logits on random tokens that are not special.

    Where config.json does not say how a router weighs experts, both ways are tried: transformers
    has the way in its code, and the converter looks for it in config.json. Where the file has no
    cap of the logits, it is also tried with the word that there is none: of some architectures
    llama.cpp takes for granted that logits are capped at 30.

    Args:
        folder: The checkpoint, with a converter's file beside it.
        threads: Of both runtimes.

    Returns:
        {dtype: of the matrices that were compared, tokens, finite, mean_kld in nats,
        relative_error: of the logits, as a share of their spread over the vocabulary, settings: of
        the file, which were found by trying}.

    Raises:
        StageError: converter_failed, if llama.cpp does not load the file.
    """
    import torch
    from scipy.special import log_softmax

    from quantline.model.gguf_checkpoint import GgufCheckpoint
    from quantline.model.whole_model import full_model_logits

    if threads:
        torch.set_num_threads(threads)
    converted = GgufCheckpoint(folder)
    tokens = tokens_to_compare(converted)
    ours = log_softmax(full_model_logits(converted.checkpoint, tokens).numpy(), axis=-1)
    results = []
    refusals = []
    for settings in settings_to_try(converted):
        try:
            theirs, dtype = _llama_cpp_logprobs(converted, tokens, threads, settings)
        except StageError as error:
            refusals.append(error)
            continue
        found = {"dtype": dtype, "tokens": int(tokens.size), "settings": settings}
        results.append(found | difference(ours, theirs))
        if agree(results[-1]):
            return results[-1]
    if not results:
        raise refusals[0]
    return results[0]


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Return how log-probabilities float32 [sequences, length, vocabulary] differ (see `compare`).

    Raises:
        StageError: converter_failed, for another vocabulary.
    """
    if theirs.shape != ours.shape:
        raise _wrong(f"a file with {ours.shape[-1]} logits", theirs.shape[-1])
    if not np.isfinite(theirs).all():
        return {"finite": False, "mean_kld": None, "relative_error": None}
    divergence = (np.exp(ours) * (ours - theirs)).sum(-1, dtype=np.float64).mean()
    error = np.std(theirs - ours, axis=-1).mean() / np.std(ours, axis=-1).mean()
    return {
        "finite": True,
        "mean_kld": max(0.0, float(divergence)),
        "relative_error": float(error),
    }


def agree(figures: dict[str, Any]) -> bool:
    """Whether logits differ by no more than rounding makes."""
    divergence, error = MOST[figures["dtype"]]
    if not figures["finite"]:
        return False
    return figures["mean_kld"] <= divergence and figures["relative_error"] <= error


def settings_to_try(converted: "GgufCheckpoint") -> list[dict[str, float]]:
    """Return settings of the file that its logits may need, none at first."""
    import gguf

    name = converted.architecture_name
    ways: list[dict[str, float]] = [{}]
    key = gguf.Keys.LLM.EXPERT_GATING_FUNC.format(arch=name)
    experts = gguf.Keys.LLM.EXPERT_COUNT.format(arch=name)
    if experts in converted.fields and key not in converted.fields:
        known = gguf.ExpertGatingFuncType
        ways += [{key: int(known.SIGMOID)}, {key: int(known.SOFTMAX)}]
    cap = gguf.Keys.LLM.FINAL_LOGIT_SOFTCAPPING.format(arch=name)
    if cap not in converted.fields:
        ways += [way | {cap: 0.0} for way in ways]
    return ways


def tokens_to_compare(converted: "GgufCheckpoint") -> np.ndarray:
    """Return token ids int32 [SEQUENCES, LENGTH] that stand for pieces of text.

    Placeholders of images and sounds are not among them: wrappers compute them in other ways.
    """
    from quantline.text.tokenizer import Tokenizer

    tokenizer = Tokenizer(converted.folder)
    special = {token["id"] for token in tokenizer.spec.get("added_tokens", [])}
    special |= named_tokens(converted.config)
    rows = converted.shape(converted.arch.embedding)[0]
    plain = [
        token for token in range(min(rows, tokenizer.fast.get_vocab_size())) if token not in special
    ]
    generator = np.random.default_rng(SEED)
    most = converted.arch.max_positions or LENGTH  # 0 where config.json names no limit
    length = min(LENGTH, most)
    tokens = generator.choice(np.array(plain), (SEQUENCES, length)).astype(np.int32)
    begin = tokenizer.specials.begin
    tokens[:, : len(begin)] = begin
    return tokens


def named_tokens(config: dict[str, Any]) -> set[int]:
    """Return the token ids that a config.json has a name for, such as image_token_id."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= named_tokens(value)
        elif key.endswith(TOKEN_KEYS):
            found |= {
                one for one in (value if isinstance(value, list) else [value]) if one is not None
            }
    return found


def _llama_cpp_logprobs(
    converted: "GgufCheckpoint",
    tokens: np.ndarray,
    threads: int | None,
    settings: dict[str, float],
) -> tuple[np.ndarray, str]:
    """Return log-probabilities float32 [sequences, length, vocabulary], and the matrices' type.

    Raises:
        StageError: converter_failed.
    """
    from quantline.runtimes.llama_cpp import Engine

    with tempfile.TemporaryDirectory(dir=converted.converted_folder) as temporary:
        bundle = Path(temporary)
        dtype = converted.stored_dtype(converted.arch.embedding)
        widened = dtype != "F32" and _has_room(converted, bundle)
        if widened or settings:
            converted.write_copy(bundle / "model.gguf", settings, widened)
        else:
            (bundle / "model.gguf").symlink_to(converted.path.resolve())
        try:
            logprobs = Engine(bundle, threads).logprobs(tokens)
            return logprobs, "F32" if widened else dtype
        except StageError as error:
            if error.failure != Failure.RUNTIME_CRASHED:
                raise
            raise _wrong("a file that llama.cpp loads", str(error)) from None


def _wrong(expected: str, found: object) -> StageError:
    return StageError(
        Failure.CONVERTER_FAILED,
        f"expected llama.cpp's converter to make {expected}, found {found}; take another format, "
        "or a newer checkout of llama.cpp (model.converter)",
    )


def _has_room(converted: "GgufCheckpoint", folder: Path) -> bool:
    """Whether disk and memory hold the file in float32, with as much to spare."""
    size = 4 * sum(int(np.prod(converted.shape(name))) for name in converted.names)
    return 2 * size < min(shutil.disk_usage(folder).free, available_bytes())
