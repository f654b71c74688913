"""Bringing a trained model in: fetch or link it, check it, pin it, merge its adapter."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.params import Model
from quantline.files import describe_files, versions, write_json
from quantline.ingest import lora, verify
from quantline.ingest.fetch import bring, fetch
from quantline.ingest.plain_source import named_by_source, plain_source
from quantline.ingest.settle_tokenizer import settle_tokenizer
from quantline.ingest.source_card import bring_card
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, SINGLE, listing_sha256
from quantline.model.configuration import (
    CONFIG,
    read_config,
    without_code_choices,
    write_configuration,
)
from quantline.model.dequantized import said_of
from quantline.model.structure import write_structure
from quantline.text.chat_form import chat_form
from quantline.text.tokenizer import Tokenizer

PACKAGES = ("transformers", "optimum", "safetensors", "huggingface-hub")
ADAPTER = "adapter/"  # before the names of its files in the manifest


class LoadedModel(NamedTuple):
    """What `load` made.

    Attributes:
        manifest: The content of the folder's manifest.json.
        linked_by: How the weights share the source's bytes.
        notes: Sentences on what was there and does not count.
    """

    manifest: dict[str, Any]
    linked_by: str
    notes: tuple[str, ...] = ()

    @property
    def files_read(self) -> dict[str, str]:
        """Path → sha256 of the user's own files that the model came from.

        A folder stands there with a slash at the end, and the hash of the names in it.
        """
        source = self.manifest["source"]
        hashes = {}
        home = source.get("path")
        is_file = home is not None and Path(home).is_file()
        if is_file:
            home = str(Path(home).parent)
        elif home is not None:
            hashes[f"{home}/"] = listing_sha256(Path(home))
        for name, entry in self.manifest["files"].items():
            if name.startswith(ADAPTER):
                hashes[f"{source['adapter']}/{name.removeprefix(ADAPTER)}"] = entry["sha256"]
            elif home is not None:
                hashes[f"{home}/{name}"] = entry["sha256"]
        return hashes


def drop_code_choices(folder: Path) -> list[dict[str, Any]]:
    """Take out of a folder's config.json what chooses code; return the step, if there was any."""
    config, dropped = without_code_choices(read_config(folder))
    if not dropped:
        return []
    write_json(folder / CONFIG, config)
    return [{"step": "drop_config_keys", "keys": sorted(dropped)}]


def notes_on(origin: Path, model: Model, manifest: dict[str, Any]) -> Iterator[str]:
    """Say what lies in a checkpoint's folder and does not count."""
    if (origin / SINGLE).is_file() and (origin / INDEX).is_file():
        yield (
            f"{SINGLE} is the model, as for transformers; the shards of {INDEX} beside it are left "
            "out"
        )
    if (origin / lora.CONFIG).is_file() and model.adapter is None:
        yield f"the adapter beside the model is left out; to merge it, set model.adapter={origin}"
    if said := said_of(manifest["transforms"]):
        yield said
    for step in manifest["transforms"]:
        if step["step"] == "drop_config_keys":
            yield f"{CONFIG} may not choose code: left out {', '.join(step['keys'])}"


def load(model: Model, folder: Path) -> LoadedModel:
    """Put a checked checkpoint into a folder, with a manifest of where it comes from.

    Args:
        model: The section `model` of params.yaml.
        folder: An empty folder.

    Raises:
        StageError: As `fetch`, `verify` and `lora.merge` do.
    """
    fetched, source = fetch(model)
    with named_by_source(folder, fetched):
        return _load_fetched(model, folder, fetched, source)


def _load_fetched(model: Model, folder: Path, fetched: Path, source: dict[str, Any]) -> LoadedModel:
    """Put what was fetched into a folder."""
    plain = plain_source(fetched, folder)
    origin = plain.folder
    verify.check_has_tokenizer(origin)
    checkpoint = Checkpoint(origin)
    description = verify.check_checkpoint(checkpoint)
    names, linked_by = bring(origin, folder)
    files = plain.files or describe_files(origin, names)
    transforms = [*plain.transforms, *drop_code_choices(folder)]
    write_configuration(folder)
    transforms += settle_tokenizer(origin, folder)
    verify.check_tokenizer(folder, checkpoint.shape(checkpoint.arch.embedding)[0])
    card = bring_card(fetched, folder)
    # Of the source's card only what it says counts: prose that changes makes no other model.
    files = files | describe_files(folder, card.get("legal", ()))
    if model.adapter:
        adapter = Path(model.adapter)
        transforms.append(lora.merge(checkpoint, adapter, folder))
        for name, entry in describe_files(adapter, [lora.CONFIG, lora.WEIGHTS]).items():
            files[ADAPTER + name] = entry
    loaded = Checkpoint(folder, structure=checkpoint.structure)
    if loaded.structure is None:
        verify.check_runs(loaded)
    else:
        write_structure(folder, verify.check_blocks(loaded))
    if plain.transforms:
        structure = Checkpoint(folder).structure  # as it was found by running it
        plain.check_agreement(Checkpoint(origin, structure=structure))
        if not model.adapter:  # codes of what the adapter changed stand for something else
            plain.bring_codes(folder)
        linked_by = plain.made_by
        shutil.rmtree(origin)
    manifest = {
        "source": source | {"adapter": model.adapter},
        "files": files,
        "transforms": transforms,
        "converter": model.converter,  # of GGUF variants, which read it here
        "card": card,
        "chat_form": chat_form(Tokenizer(folder)),
        **description,
        "versions": versions(*PACKAGES),
    }
    write_json(folder / "manifest.json", manifest)
    return LoadedModel(manifest, linked_by, tuple(notes_on(fetched, model, manifest)))
