"""The statistics of a text by workers: each sums up a part of it, then blocks are merged.

A part is summed by the code that sums a whole text, and merging adds the parts in their order, as
one process does. So the files are the same to the byte. The sums of the parts are on disk until
all blocks are merged: for each part, half of H and all of G in single precision.
"""

import json
import os
import shutil
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from quantline.calibration.block_files import INPUTS, OUTPUTS, WEIGHTED, BlockWriter, block_file
from quantline.calibration.collect import (
    Part,
    check_finite_states,
    collect_statistics,
    remove_progress,
)
from quantline.calibration.embedding_and_head import (
    EMBEDDING,
    FINAL,
    TOKENS,
    keep_embedding_moments,
    keep_final_states,
)
from quantline.calibration.input_moments import InputSums, note_dropped
from quantline.calibration.output_moments import OutputSums
from quantline.calibration.sums import Sums, parts_of
from quantline.calibration.weighted_moments import WeightedSums
from quantline.config.executor import Executor
from quantline.errors import Failure, StageError
from quantline.executor.agreement import check_agreement, digests
from quantline.executor.item import Item, move_files
from quantline.executor.run_items import run_items
from quantline.files import as_json, read_json, sha256_file, versions, write_json, write_tensors
from quantline.model.block_runner import sequences_in_batch
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.same_bits import same_bits
from quantline.run.code_digest import code_digest

FOLDER = "parts"
LAYERS = "layers.json"
SUMS: dict[str, type[Sums]] = {INPUTS: InputSums, WEIGHTED: WeightedSums, OUTPUTS: OutputSums}
PACKAGES = ("torch", "numpy", "transformers")
SumsType = TypeVar("SumsType", bound=Sums)


def collect_by_workers(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    folder: Path,
    seed: int | None,
    weighted: bool,
    executor: Executor,
) -> dict[str, dict[str, Any]]:
    """Write the statistics of every linear layer, as `collect_statistics` does, by workers.

    Args:
        checkpoint: The unquantized model, without experts: whether one is undercalibrated is known
            of the whole text only.
        tokens: int32 [sequences, length].
        folder: Where to write.
        seed: As for `collect_statistics`.
        weighted: As for `collect_statistics`.
        executor: Who works.

    Returns:
        As `collect_statistics` does.

    Raises:
        StageError: As `collect_statistics` and `run_items` do.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    write_tensors(folder / TOKENS, {"tokens": tokens})
    shared = {
        "model": str(checkpoint.folder.resolve()),
        "tokens": str((folder / TOKENS).resolve()),
        "seed": seed,
        "weighted": weighted,
        "key": digests(_inputs(checkpoint, folder / TOKENS)),
    }
    parts = _sum_parts(shared, tokens, folder, executor)
    kinds = [INPUTS, *([WEIGHTED] if weighted else []), *([OUTPUTS] if seed is not None else [])]
    _merge_blocks(parts, kinds, checkpoint.arch.layers, folder, executor)
    layers = _merge_layers([read_json(part / LAYERS) for part in parts])
    layers = {name: layers[name] for name in checkpoint.arch.linears()}
    _merge_outside(parts, layers, folder, seed is not None)
    return dict(sorted(layers.items()))


def remove_parts(folder: Path) -> None:
    """Remove the sums of parts, once all results are there."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _inputs(checkpoint: Checkpoint, tokens: Path) -> dict[str, Any]:
    """Return what the sums of a part depend on, besides the item's own words."""
    return {
        "model": checkpoint.stamp(),
        "calibration text": sha256_file(tokens),
        "versions": versions(*PACKAGES),
        "code": code_digest("calibrate"),
        "device": device().type,
    }


def _sum_parts(
    shared: dict[str, Any], tokens: np.ndarray, folder: Path, executor: Executor
) -> list[Path]:
    """Have workers sum up the parts of a text; return their folders, in order."""
    rows = sequences_in_batch(tokens.shape[1])
    parts = parts_of(-(-len(tokens) // rows))
    folders = [folder / FOLDER / f"{number:03d}" for number in range(len(parts))]
    items = []
    for number, part in enumerate(parts):
        if not folders[number].is_dir():
            first = part.start * rows
            last = min(part.stop * rows, len(tokens))
            arguments = {"shared": shared, "number": number, "first": first, "last": last}
            label = f"part {number + 1} of {len(parts)} of the calibration text"
            items.append(Item(label, "sum_part", arguments))

    def take(item: Item, made: Path) -> None:
        os.rename(made, folders[item.arguments["number"]])

    run_items(executor, items, folder, take, "calibrating", "part")
    return folders


def sum_part(shared: dict[str, Any], number: int, first: int, last: int, folder: Path) -> None:
    """Write the sums of a part of the text into a folder, as a worker does it.

    Args:
        shared: What the parts have in common.
        number: Of the part.
        first: Its first sequence.
        last: The sequence before which it ends.
        folder: For the result.

    Raises:
        StageError: artifact_changed, if this machine does not see what the stage sees; as
            `collect_statistics` does.
    """
    checkpoint, tokens = _opened(as_json(shared))
    part = Part(tokens.size, first * tokens.shape[1])
    seed, weighted = shared["seed"], shared["weighted"]
    layers = collect_statistics(checkpoint, tokens[first:last], folder, seed, weighted, part)
    remove_progress(folder)
    write_json(folder / LAYERS, layers)


@lru_cache(maxsize=1)
def _opened(text: str) -> tuple[Checkpoint, np.ndarray]:
    """Open model and tokens, and hold them against what the stage found."""
    shared = json.loads(text)
    checkpoint = Checkpoint(Path(shared["model"]))
    check_agreement(shared["key"], _inputs(checkpoint, Path(shared["tokens"])))
    return checkpoint, load_file(shared["tokens"])["tokens"]


def _merge_blocks(
    parts: list[Path], kinds: list[str], blocks: int, folder: Path, executor: Executor
) -> None:
    """Have workers merge the sums of the parts, block by block."""
    where = [str(part.resolve()) for part in parts]
    items = []
    for block in range(blocks):
        # The last kind comes last: with it the block is complete.
        if not (folder / block_file(kinds[-1], block)).is_file():
            arguments = {"parts": where, "kinds": kinds, "block": block}
            items.append(Item(f"the statistics of block {block}", "merge_block", arguments))

    def take(item: Item, made: Path) -> None:
        move_files(made, folder, [block_file(kind, item.arguments["block"]) for kind in kinds])

    run_items(executor, items, folder, take, "merging", "block")


@same_bits()
def merge_block(parts: list[str], kinds: list[str], block: int, folder: Path) -> None:
    """Write the statistics of a block from the sums of the parts, as a worker does it.

    Args:
        parts: Their folders, in order.
        kinds: Of statistics.
        block: Its number.
        folder: For the result.
    """
    for kind in kinds:
        writer = BlockWriter(folder, kind)
        with ExitStack() as stack:
            paths = [Path(part) / block_file(kind, block) for part in parts]
            files = [stack.enter_context(safe_open(path, "np")) for path in paths]
            layers = {name.rpartition(".")[0] for file in files for name in _names(file)}
            for layer in sorted(layers):
                moments, more = _merged(SUMS[kind], files, f"{layer}.").finish()
                writer.add(layer, moments, **more)
        writer.close(block)


def _names(file: Any) -> list[str]:
    """Return the names of a safetensors file's tensors."""
    return list(file.keys())


def _merged(sums: type[SumsType], files: list[Any], prefix: str = "") -> SumsType:
    """Return the sums over all parts, of which one at a time is read.

    Args:
        sums: Their kind.
        files: Of safetensors, in the order of the parts; one may lack the layer.
        prefix: Of the tensors' names.
    """
    total: SumsType | None = None
    for file in files:
        names = [name for name in _names(file) if name.startswith(prefix)]
        if not names:
            continue
        part = sums.of({name.removeprefix(prefix): file.get_tensor(name) for name in names})
        if total is None:
            total = part
        else:
            total.add(part)
    assert total is not None, "a layer without sums is not listed"
    return total


def _merge_layers(parts: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return what was seen of each layer in all parts.

    Raises:
        StageError: calibration_empty, if layers share an input in one part and not in another.
    """
    layers: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, entry in part.items():
            total = layers.setdefault(name, entry | {"tokens": 0})
            if entry["moments"] != total["moments"]:
                raise StageError(
                    Failure.CALIBRATION_EMPTY,
                    f"expected {name} to share an input with {total['moments']} in all of the "
                    f"text, found it with {entry['moments']} in a part; set executor=local and "
                    "executor.workers=1",
                )
            total["tokens"] += entry["tokens"]
    for name in {entry["moments"] for entry in layers.values()}:
        dropped = sum(part.get(name, {}).get("not_finite", 0) for part in parts)
        note_dropped(layers, name, dropped)
    return layers


@same_bits()
def _merge_outside(
    parts: list[Path], layers: dict[str, dict[str, Any]], folder: Path, gradients: bool
) -> None:
    """Write the statistics of embedding and head from those of the parts.

    Raises:
        StageError: non_finite.
    """
    files = [load_file(part / FINAL) for part in parts]
    check_finite_states(any(bool(file["finite"][0]) for file in files), layers)
    keep_final_states(torch.from_numpy(np.concatenate([file["states"] for file in files])), folder)
    if gradients:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(part / EMBEDDING, "np")) for part in parts]
            keep_embedding_moments(_merged(OutputSums, opened), folder)
