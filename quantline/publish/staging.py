"""The folder that is uploaded: links to the bundles' files, and the cards beside them.

The bundles in artifacts/exports stay as they were measured. What is new is the README, with the
figures, and a manifest that names no path of this machine.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from quantline.config.params import Params
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json, write_text
from quantline.formats.bundle.manifest import MANIFEST, README, SMOKE
from quantline.links import link
from quantline.model.gguf_files import model_file
from quantline.model.origin import origin_of
from quantline.paths import EXPORTS
from quantline.publish.card import card_of_one, card_of_several
from quantline.report.build import Report
from quantline.report.variant import VariantRow
from quantline.run.project_lock import FOLDER

STAGING = FOLDER / "publish"


def stage(
    rows: Sequence[VariantRow],
    report: Report,
    params: Params,
    repository: str,
    base_model: str | None = None,
) -> Path:
    """Make the folder of a repository: one bundle as it is, several in folders of their names.

    Args:
        rows: Of the variants, with figures.
        report: With all variants.
        params: Of the project.
        repository: owner/name.
        base_model: The model's id on the Hub, where the source is no model of the Hub.

    Raises:
        StageError: publication_refused, if two GGUF files would answer to one name.
    """
    check_tags(rows)
    folder = STAGING / repository.replace("/", "--")
    shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        place = folder / row.variant if len(rows) > 1 else folder
        bundle = EXPORTS / row.variant
        manifest = read_json(bundle / MANIFEST)
        for name in (*manifest["files"], SMOKE):
            link(bundle / name, place / name)
        write_json(place / MANIFEST, without_paths(manifest))
        write_text(place / README, card_of_one(row, report, params, repository, base_model))
    if len(rows) > 1:
        write_text(folder / README, card_of_several(rows, report, params, base_model))
        first = EXPORTS / rows[0].variant
        for name in origin_of(read_json(first / MANIFEST)).legal:
            link(first / name, folder / name)  # the terms hold for the whole repository
    return folder


def check_tags(rows: Sequence[VariantRow]) -> None:
    """Check that each GGUF file has a name of its own, as programs ask for it by `:Q4_K_M`.

    Raises:
        StageError: publication_refused.
    """
    taken: dict[str, str] = {}
    for row in rows:
        if row.format != "gguf":
            continue
        name = model_file(list(row.lineage["files"]))
        if name in taken:
            raise StageError(
                Failure.PUBLICATION_REFUSED,
                f"expected GGUF variants of different types in one repository, found that "
                f"{taken[name]} and {row.variant} are both {name}, and a program that asks for it "
                "by its type may get either; publish them to two repositories",
            )
        taken[name] = row.variant


def without_paths(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest whose source names no folder of this machine; its hashes stay."""
    source = dict(manifest["source"])
    for key in ("path", "adapter"):
        if source.get(key):
            source[key] = PurePath(source[key]).name
    return manifest | {"source": source}
