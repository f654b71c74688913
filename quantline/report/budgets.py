"""What a budget chose, and how the result compares with the uniform recipe of its size."""

from collections import Counter

CHOICES = ("name", "budget", "mix", "overrides", "bits", "group_size")  # of a recipe, in which the two of a pair may differ


def told(manifest: dict) -> dict | None:
    """What the page says of a choice: prediction, what one MiB more would bring, and how many tensors got what."""
    found = next((one for one in manifest.get("transforms", ()) if one["step"] == "budget"), None)
    if found is None:
        return None
    counts = Counter(one["what"] for one in found["chosen"].values())
    told_ = {key: found[key] for key in ("predicted", "price_per_mib", "unit", "rounding")}
    return told_ | {"counts": dict(sorted(counts.items()))}


def beside(row: dict, rows: list[dict]) -> dict | None:
    """The uniform variant that a fitted one is held against: the nearest in size of those that are made and served alike.

    `kld_change` is the share by which the mean KL divergence is larger (negative: smaller). None for a variant without a
    budget, and where there is no such other.
    """
    if not row.get("budget"):
        return None
    others = [one for one in rows if one["status"] == "ok" and not one.get("budget") and _alike(one) == _alike(row)]
    if not others:
        return None
    size = row["metrics"]["size_bytes"]
    found = min(others, key=lambda one: (abs(one["metrics"]["size_bytes"] - size), one["variant"]))
    theirs = found["metrics"]
    return {"variant": found["variant"], "size_bytes": theirs["size_bytes"], "mean_kld": theirs["mean_kld"],
            "mean_kld_se": theirs["mean_kld_se"],
            "kld_change": row["metrics"]["mean_kld"] / theirs["mean_kld"] - 1 if theirs["mean_kld"] > 0 else None}


def said(row: dict) -> str:
    """The comparison in words."""
    other, change = row["beside"], row["beside"]["kld_change"]
    told = f": KL divergence {100 * change:+.0f} %" if change is not None else ""
    return f"{row['variant']} beside {other['variant']} of {other['size_bytes'] / 2**20:.2f} MiB{told}"


def _alike(row: dict) -> tuple:
    recipe = row["lineage"]["recipe"]
    return row["format"], row["runtime"], sorted((key, str(value)) for key, value in recipe.items() if key not in CHOICES)
