"""What DVC watches: it reads whole folders, and stops without a name where a link leads nowhere."""

from pathlib import Path

from quantline.config.params import Params

NAMED = 3  # links in a message


def broken_links(params: Params) -> list[str]:
    """Return a message for each watched folder with links that DVC cannot follow.

    They lead nowhere, or to a folder that they are in. That load does not need them is no help:
    DVC hashes the folder before load runs.
    """
    model = params.model
    problems = []
    for key, watched in (("model.path", model.watch), ("model.adapter", model.adapter_watch)):
        folder = Path(watched or "")
        if not watched or not folder.is_dir() or (key != "model.path" and watched == model.watch):
            continue
        links = _links_that_break(folder)
        if links:
            shown = ", ".join(f"{link} (to {link.readlink()})" for link in links[:NAMED])
            more = f" and {len(links) - NAMED} more" if len(links) > NAMED else ""
            problems.append(
                f"{key}: expected links that lead to something, found {shown}{more}; remove them: "
                "DVC hashes the whole folder and would stop there"
            )
    return problems


def _links_that_break(folder: Path) -> list[Path]:
    links = []
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        # A circle of links does not exist, and has no place either.
        if not path.exists() or path.parent.resolve().is_relative_to(path.resolve()):
            links.append(path)
    return links
