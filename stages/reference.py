"""What the unquantized model makes of the evaluation text and the gold set: the truth that variants are held against.

    python -m stages.reference     # artifacts/model, evaluation section → artifacts/reference/
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from quantline.text import documents as texts
from quantline.model.architecture import architecture
from quantline.model.block_runner import run_blocks
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.metrics import gold_set as gold
from quantline.model.output_head import FILE, OutputHead
from quantline.metrics.scoring import score
from quantline.errors import Failure, StageError
from quantline.files import sha256_file, sha256_json, versions, write_json, write_text
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.mlflow_runs import evaluation_datasets
from quantline.paths import CALIBRATION, MODEL, REFERENCE

CHUNK_VALUES = 1 << 24  # log-probabilities held at once, so that a large vocabulary needs no gigabytes


def tokenize(item: gold.GoldItem, tokenizer: Tokenizer) -> gold.TokenizedItem:
    """A gold item as token ids: the prompt as the model expects it, answer or choices encoded on their own."""
    choices = item.choices or ([] if item.generated else [item.answer])
    continuations, end = [tokenizer.encode(choice) for choice in choices], tokenizer.special("eos_token")
    divisors = {"tokens": [len(tokens) for tokens in continuations], "length": [len(choice) for choice in choices],
                "none": [1] * len(choices)}[item.normalize]
    return gold.TokenizedItem(
        id=item.id, task=item.task, text=tokenizer.render(item.chat, True) if item.chat else item.prompt,
        reference=item.answer, kind="choices" if item.choices else "generated" if item.generated else "forced",
        prompt=tokenizer.prompt(item.prompt, item.chat), continuations=continuations,
        answer=choices.index(item.answer) if choices else 0, divisors=divisors, match=item.match, stop=item.stop,
        max_tokens=item.max_tokens or gold.MAX_TOKENS, end=[] if end is None else [end])


class Unquantized:
    """The baseline as scoring asks for it. Each weight is read once: all sequences go through the blocks together."""

    def __init__(self, checkpoint: Checkpoint, head: OutputHead, tokenizer: Tokenizer,
                 items: list[gold.TokenizedItem]) -> None:
        self.checkpoint, self.head, self.decode = checkpoint, head, tokenizer.decode
        # As `follow` runs them: without the last token.
        rows = sorted({tuple((item.prompt + tokens)[:-1]) for item in items for tokens in item.continuations})
        self.hidden = dict(zip(rows, self._run(rows, "gold set"), strict=True)) if rows else {}
        self.written = self._write({(tuple(item.prompt), item.max_tokens, frozenset(item.end))
                                    for item in items if item.kind == "generated"})

    def _run(self, rows: list[tuple[int, ...]], label: str) -> np.ndarray:
        """Final hidden states float32 [rows, longest, hidden], of rows padded on the right."""
        longest = max(map(len, rows))
        padded = np.array([row + (0,) * (longest - len(row)) for row in rows], np.int32)
        return run_blocks(self.checkpoint, padded, label)

    def _write(self, jobs: set[tuple]) -> dict[tuple, list[int]]:
        """Greedy decoding of (prompt, most tokens, ending tokens), a token of all of them at each pass."""
        written: dict[tuple, list[int]] = {job: [] for job in sorted(jobs, key=lambda job: (*job[:2], sorted(job[2])))}
        going = list(written)
        while going:
            rows, still = [job[0] + tuple(written[job]) for job in going], []
            for job, row, hidden in zip(going, rows, self._run(rows, "gold set, generating"), strict=True):
                token = int(self.head.logprobs(hidden[len(row) - 1:len(row)])[0].argmax())
                if token not in job[2]:
                    written[job].append(token)
                    still += [job] if len(written[job]) < job[1] else []
            going = still
        return written

    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        whole = [next(row for row in (tuple(line[:n]) for n in range(len(line), 0, -1)) if row in self.hidden)
                 for line in tokens.tolist()]
        return np.stack([self.head.logprobs(self.hidden[row][:tokens.shape[1]]) for row in whole])

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        return self.written[tuple(prompt), max_new_tokens, frozenset(stop)]


def perplexity(head: OutputHead, hidden: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of every token after the first of each sequence.

    `hidden` float32 [n, length, D], `tokens` int32 [n, length]. Raises StageError(non_finite).
    """
    step, total = max(1, CHUNK_VALUES // len(head)), 0.0
    states, following = hidden[:, :-1].reshape(-1, hidden.shape[-1]), tokens[:, 1:].reshape(-1)
    for start in range(0, len(following), step):
        wanted = following[start:start + step]
        values = head.logprobs(states[start:start + step])[np.arange(len(wanted)), wanted]
        total -= float(values.sum(dtype=np.float64))
    found = float(np.exp(total / len(following)))
    if not np.isfinite(found):
        raise StageError(Failure.NON_FINITE, f"expected a finite perplexity of the unquantized model, found {found}; "
                                             "look at the model and at the evaluation text")
    return found


def store(folder: Path, checkpoint: Checkpoint, tokens: np.ndarray, hidden: np.ndarray) -> None:
    """Write what the distribution after each of `tokens` int32 [n, length] is rebuilt from: hidden float32 [n, length, D] and
    the head, as the checkpoint has it.
    """
    facts, bias = architecture(checkpoint), checkpoint.optional(architecture(checkpoint).head_bias)
    save_file({"hidden": hidden, "tokens": tokens}, folder / "hidden.safetensors")
    save_file({"weight": checkpoint.raw(facts.head)} | ({} if bias is None else {"bias": bias}), folder / FILE)


def check_texts(run: StageRun, documents: list[texts.Document], questions: list[gold.GoldItem]) -> None:
    """The texts are disjoint, and the calibration text is still the one that was calibrated on.

    Raises StageError: texts_overlap, artifact_changed.
    """
    info = Moments(CALIBRATION).info
    text = run.params.calibration.model_copy(update={"dataset_revision": info["dataset_revision"]})
    seen = texts.documents(text)
    if texts.sha256_documents(seen) != info["text_sha256"]:
        raise StageError(Failure.ARTIFACT_CHANGED, f"expected the calibration text that {CALIBRATION} was made from, found "
                                                   f"another in {text.path or text.dataset}; run calibrate again")
    texts.check_disjoint(seen, documents, {one.id: one.prompt for one in questions})


def reference(run: StageRun) -> None:
    evaluation, checkpoint = texts.pinned(run.params.evaluation), Checkpoint(MODEL)
    facts, tokenizer = architecture(checkpoint), Tokenizer(MODEL)
    documents = texts.documents(evaluation)
    questions = gold.load_gold(Path(evaluation.gold)) if evaluation.gold else []
    check_texts(run, documents, questions)

    tokens = tokenizer.pack(documents, evaluation.sequences, evaluation.length)
    hidden = run_blocks(checkpoint, tokens, "reference")
    head = OutputHead(checkpoint.tensor(facts.head), facts.logit_scale, facts.logit_softcap,
                      checkpoint.optional(facts.head_bias))
    items = [tokenize(question, tokenizer) for question in questions]
    baseline = score(Unquantized(checkpoint, head, tokenizer, items), items) if items else []
    accuracy = gold.accuracy(baseline)

    info = {"head": facts.head, "logit_scale": facts.logit_scale, "logit_softcap": facts.logit_softcap,
            "dataset_revision": evaluation.dataset_revision, "tokens": int(tokens.size),
            "text_sha256": texts.sha256_documents(documents),
            "gold_sha256": sha256_file(Path(evaluation.gold)) if evaluation.gold else None, "gold_items": len(items),
            "gold_accuracy": accuracy, "perplexity": perplexity(head, hidden, tokens),
            "versions": versions("torch", "transformers", "tokenizers")}
    with run.output(REFERENCE) as folder:
        store(folder, checkpoint, tokens, hidden)
        write_text(folder / "gold.jsonl", "".join(json.dumps(asdict(item)) + "\n" for item in items))
        write_json(folder / "baseline.json", [result.as_dict() for result in baseline])
        write_json(folder / "reference.json", info)
    run.track(key=f"reference:{sha256_json(info)}", name="reference", files=[REFERENCE / "reference.json"],
              datasets=evaluation_datasets(evaluation, info),
              params={"text_sha256": info["text_sha256"], "gold_sha256": info["gold_sha256"]},
              metrics={"perplexity": info["perplexity"], "tokens": tokens.size,
                       "gold": accuracy})
    told = f", gold accuracy {accuracy['all']:.3f} on {len(items)} items" if items else ", no gold set"
    run.finish(f"perplexity {info['perplexity']:.3f} on {tokens.size} tokens{told}, {hidden.nbytes / 2**20:.1f} MiB")


if __name__ == "__main__":
    with stage_run("reference") as this:
        reference(this)
