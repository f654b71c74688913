"""The stages: which names they take, which stage each continues, and the ids of their runs."""

from quantline.config.params import Params
from quantline.files import sha256_json

# Stage → the section of params.yaml whose names it takes.
INSTANCES = {
    "quantize": "recipes",
    "export": "variants",
    "smoke": "variants",
    "evaluate": "variants",
    "lm_eval": "variants",
}
# Stage → the stage whose result it continues.
UPSTREAM = {
    "answer": "load",
    "calibrate": "load",
    "reference": "calibrate",
    "quantize": "calibrate",
    "export": "quantize",
    "smoke": "export",
    "evaluate": "export",
    "lm_eval": "export",
}
# Parameters that compare alone reads, and the digest of files.
FOR_COMPARE = frozenset({"conf_sha256", "target", "tracking"})
WHO_COMPUTES = frozenset({"executor"})  # which makes no other result


def run_name(stage: str, instance: str | None, params: Params | None) -> str:
    """Return `<stage>-<hash>`: the same stage with the same parameters has the same id.

    Args:
        stage: The stage.
        instance: Its recipe or variant, if it takes one.
        params: The content of params.yaml, if it could be read.
    """
    # Another target makes no other model: what a run says of a variant holds for every target.
    apart = WHO_COMPUTES if stage == "compare" else FOR_COMPARE | WHO_COMPUTES
    values = params.model_dump(mode="json", exclude=set(apart)) if params else None
    return f"{stage}-{sha256_json([stage, instance, values])[:12]}"


def parent_name(stage: str, instance: str | None, params: Params | None) -> str | None:
    """Return the id of the run that this one continues; None for the first stage.

    Arguments are as in `run_name`. Without parameters no run is continued.
    """
    upstream = UPSTREAM.get(stage)
    if upstream is None or params is None:
        return None
    if upstream == "quantize" and instance in params.variants:
        instance = params.variants[instance].recipe
    named = upstream in ("quantize", "export")
    return run_name(upstream, instance if named else None, params)
