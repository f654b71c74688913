"""The command `quantline`.

quantline init    [OVERRIDES...]     a project's own choices, kept in conf/experiment/
quantline list    KIND               models, suites, recipes, variants, targets, runtimes, ...
quantline show    GROUP NAME         one of them with all its options
quantline doctor                     what is missing or stale, and what the run will take
quantline compose [OVERRIDES...]     conf/ -> params.yaml
quantline repro   [OVERRIDES...]     compose, `dvc repro --keep-going`, then the comparison
quantline pick    [target=... ...]   which variant to ship for a target, from what was measured
quantline gate    [VARIANT]          exit code 1 unless the pick, or the variant, meets the target
quantline verify  [VARIANT|BUNDLE]   whether files and figures are what was exported and measured
quantline promote [VARIANT]          the pick, or the variant, becomes the registered champion
quantline publish VARIANTS --to ...  bundles on the Hugging Face Hub, with cards that have figures
quantline serve   VARIANT|BUNDLE     the runtime's own server on a checked bundle
quantline chat    VARIANT [VARIANT]  ask one variant, or two side by side
quantline track                      deliver the runs that MLflow did not take when they were made
quantline grid    METHOD --OPTION    recipe, variant and suite files for a grid of options
quantline sweep   OVERRIDES...       experiments over values of parameters, and one page over them
quantline lm-eval VARIANTS... --tasks ...    tasks of lm-evaluation-harness on built variants

Overrides are Hydra's: `suite=quick`, `model=local model.path=/models/mine`,
`recipes.gptq-w4g128.bits=3`, `+variant=[gguf-f16]` (one more variant),
`variant=[bf16,gguf-q4_k_m]` (these variants alone). Each call starts from conf/ anew: overrides of
an earlier call are not remembered, unless `quantline init` has kept them.
"""

from quantline.cli import (
    chat,
    choices,
    compose,
    doctor,
    grid,
    init,
    judge,
    lm_eval,
    promote,
    publish,
    repro,
    serve,
    sweep,
    track,
    verify,
)
from quantline.cli.program import app

__all__ = [
    "app",
    "chat",
    "choices",
    "compose",
    "doctor",
    "grid",
    "init",
    "judge",
    "lm_eval",
    "promote",
    "publish",
    "repro",
    "serve",
    "sweep",
    "track",
    "verify",
]
