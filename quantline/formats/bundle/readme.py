"""The README of a bundle: what it is, and the lines that serve it."""

from typing import Any

from quantline.files import MIB
from quantline.model.dequantized import said_of

TEMPLATE = """\
# {variant}

Recipe {recipe[name]} ({recipe[method]}) in {format}, measured in {runtime}. \
{bits:.2f} bits per weight, {mib:.1f} MiB.
What was done to it, step by step, is in manifest.json; what it answers, in smoke.json.{said}

    artifact sha256  {sha256}

{limits}{serve}"""


def bundle_readme(manifest: dict[str, Any], serve_text: str) -> str:
    """Return README.md for a bundle.

    Args:
        manifest: The content of its manifest.json.
        serve_text: The section "## Serve it", which its container writes.
    """
    limits = "".join(f"* {sentence}\n" for sentence in manifest.get("limits", ()))
    return TEMPLATE.format(
        said=f"\n{said}" if (said := said_of(manifest["transforms"])) else "",
        limits=f"## Limits\n\n{limits}\n" if limits else "",
        serve=serve_text,
        variant=manifest["variant"],
        recipe=manifest["recipe"],
        format=manifest["format"],
        runtime=manifest["runtime"],
        bits=manifest["bits_per_weight"],
        mib=manifest["size_bytes"] / MIB,
        sha256=manifest["artifact_sha256"],
    )
