"""What tables of the page are made of that no row of the report holds ready."""


def harness_columns(rows: list[dict]) -> list[dict]:
    """One {task, metric, better} for each metric of lm-evaluation-harness that a row has; `better` is higher, lower or
    nothing.
    """
    found = {}
    for row in rows:
        for task, about in row.get("lm_eval", {}).items():
            for metric, one in about["metrics"].items():
                better = {True: "higher", False: "lower"}.get(one["higher_is_better"], "")
                found[task, metric] = {"task": task, "metric": metric, "better": better}
    return [found[key] for key in sorted(found)]


def machines(rows: list[dict]) -> list[str]:
    """What the speeds were measured on and how, a sentence for each that differs."""
    said = {}
    for row in rows:
        speed = row["speed"]
        if "machine" not in speed:
            continue
        about = speed["machine"]
        where = ", ".join([about["cpu"], f"{about['cores']} cores", f"{about['memory_mib'] / 1024:.0f} GiB of memory",
                           *about["gpus"], about["system"]])
        how = (f"{speed['threads']} threads, batch {speed['batch']}, a prompt of {speed['prompt_tokens']} tokens, "
               f"{speed['new_tokens']} new tokens, {speed['repetitions']} repetitions after one to warm up")
        said.setdefault(f"{where}: {how}", []).append(row["variant"])
    alone = len(said) == 1
    return [f"{text}." if alone else f"{', '.join(names)}: {text}." for text, names in said.items()]
