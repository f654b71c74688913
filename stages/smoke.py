"""Try a bundle in the runtime that will serve it. The export stage runs this in a process of its own, which native code
may bring down, and which imports no more than the runtime does.

    python -m stages.smoke gguf-q4_k_m artifacts/exports/gguf-q4_k_m 1280 --into smoke.json   # height of the embedding
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from quantline.text.tokenizer import Tokenizer
from quantline.config.compose import load_params
from quantline.config.params import Params, Variant
from quantline.formats import tokenizer_metadata as vocabulary
from quantline.runtimes.runtime import Runtime, open_runtime
from quantline.runtimes.tokenizer_parity import TEXTS, mismatches, texts_of
from quantline.errors import Failure, StageError
from quantline.run.child_process import answer
from quantline.paths import MODEL


def check_tokenizer(bundle: Path, runtime: Runtime, source: Tokenizer, prompts: list[str], exact: bool) -> dict[str, Any]:
    """Special tokens, chat template and token ids agree with the source's; without `exact`, ids may differ and are told.

    Raises StageError(tokenizer_mismatch).
    """
    for what, (before, after) in vocabulary.differences(bundle, source).items():
        raise StageError(Failure.TOKENIZER_MISMATCH, f"expected {what} {before!r} in the bundle, found {after!r}")
    texts = (*prompts, *TEXTS, *texts_of(source))
    wrong, compared = mismatches(runtime, source, texts)
    if wrong and exact:
        raise StageError(Failure.TOKENIZER_MISMATCH, f"the bundle tokenizes {len(wrong)} of {compared} texts otherwise "
                         f"than the source, such as {wrong[0]!r}: {runtime.encode(wrong[0])[:12]} instead of "
                         f"{source.encode(wrong[0])[:12]}; choose another format, or tokenizer: report if such text is none "
                         "of yours")
    return {"texts_compared": compared, "texts_given": len(texts), "texts_differing": wrong, "special_tokens": True,
            "chat_template": source.chat_template is not None}


def smoke(bundle: Path, variant: Variant, params: Params, rows: int) -> dict[str, Any]:
    """Run the smoke prompts from the files on disk; `rows` is the height of the source's embedding.

    Raises StageError: tokenizer_mismatch, smoke_failed.
    """
    source, runtime = Tokenizer(MODEL), open_runtime(variant.runtime, bundle, params.evaluation.speed.threads)
    exact = variant.tokenizer == "exact"
    tokenizer = check_tokenizer(bundle, runtime, source, params.evaluation.smoke_prompts, exact)
    stop, tokens = {source.special("eos_token")} - {None}, params.evaluation.smoke_tokens
    traces = []
    for prompt in params.evaluation.smoke_prompts:
        ids, started = source.prompt(prompt), time.perf_counter()
        new = runtime.generate(ids, tokens, stop)
        seconds = time.perf_counter() - started
        values = runtime.logprobs(np.array([ids + new], np.int32))
        checks = {
            "finite": bool(np.isfinite(values).all()), "non_empty": bool(new), "tokenizer_parity": not exact or prompt not in tokenizer["texts_differing"],
            "repeatable": runtime.generate(ids, tokens, stop) == new, "vocabulary": values.shape[-1] == rows,
        }
        traces.append({"prompt": prompt, "output": runtime.decode(new), "token_ids": new, "seconds": round(seconds, 4),
                       "checks": checks, "passed": all(checks.values())})
    for trace in traces:
        failed = [check for check, passed in trace["checks"].items() if not passed]
        if failed:
            raise StageError(Failure.SMOKE_FAILED, f"the prompt {trace['prompt']!r} failed {', '.join(failed)} in "
                             f"{variant.runtime}, which answered {trace['output'][:80]!r}")
    return {"runtime": runtime.name, "runtime_version": runtime.version, "device": runtime.device,
            "tokenizer": tokenizer, "passed": True, "prompts": traces}


if __name__ == "__main__":
    given = load_params()
    name, folder, height, _, into = sys.argv[1:]
    answer(Path(into), lambda: smoke(Path(folder), given.variants[name], given, int(height)))
