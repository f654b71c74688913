"""All that the user supplies, checked in the first seconds: every problem, in one list.

Only headers, configurations and texts are read. What a stage finds out by itself it still refuses
by itself; here it is found before the hours of work that come in between.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from quantline.config.params import Params
from quantline.config.texts import Text
from quantline.errors import Failure, Reason, StageError
from quantline.files import read_json
from quantline.inputs.recipes import check_recipe
from quantline.metrics.gold_items import GoldItem, load_gold, prompts_of
from quantline.metrics.gold_tokens import tokenize_items
from quantline.metrics.speed import check_speed
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.find_family import family_of
from quantline.model.positions import check_item_lengths, check_length, learned_positions
from quantline.model.read_architecture import architecture_from_config
from quantline.runtimes.smoke.answers import prompt_ids
from quantline.text.disjoint import check_disjoint
from quantline.text.documents import Document, misnamed, read_documents
from quantline.text.tokenizer import Tokenizer


@dataclass
class Findings:
    """What is wrong, and what is worth knowing.

    Attributes:
        problems: Each stops the run.
        warnings: They do not: a recipe or a variant may fail by itself.
    """

    problems: list[StageError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note the StageError that the block raises, and go on."""
        try:
            yield
        except StageError as error:
            self.problems.append(error)

    def raise_problems(self) -> None:
        """Raise all problems as one.

        Raises:
            StageError: With the failure that all have, else config_invalid.
        """
        if not self.problems:
            return
        if len(self.problems) == 1:
            raise self.problems[0]
        failures = {problem.failure for problem in self.problems}
        failure = failures.pop() if len(failures) == 1 else Failure.CONFIG_INVALID
        lines = [f"- {problem.failure}: {problem}" for problem in self.problems]
        raise StageError(
            failure,
            f"found {len(lines)} problems with what the run is given; mend all of them:\n"
            + "\n".join(lines + [f"- beside them: {warning}" for warning in self.warnings]),
            Reason.CONFIG_INVALID,
        )


class InputCheck:
    """One check of the inputs that params.yaml names."""

    def __init__(self, params: Params) -> None:
        """Take the parameters."""
        self.params = params
        self.findings = Findings()

    def run(self) -> Findings:
        """Check everything; return what was found."""
        # A problem of the model is noted once; what needs the model is then left out.
        self._check_adapter()
        self._check_lengths()
        calibration = self._documents("calibration", self.params.calibration)
        evaluation = self._documents("evaluation", self.params.evaluation)
        items = self._gold()
        self._check_smoke_prompts()
        if calibration is not None and evaluation is not None:
            with self.findings.collecting():
                check_disjoint(
                    calibration,
                    evaluation,
                    prompts_of(items),
                    self.params.evaluation.allow_overlap,
                )
        self._check_recipes()
        return self.findings

    @cached_property
    def folder(self) -> Path | None:
        """The checkpoint's folder, if it lies on this machine."""
        model = self.params.model
        if model.source == "hub":
            return None  # the stage `load` checks the configuration before it fetches the weights
        from quantline.ingest.fetch import fetch

        # The same refusals, in the same words, as when the stage `load` brings it in.
        with self.findings.collecting():
            return fetch(model)[0]
        return None

    @cached_property
    def arch(self) -> Architecture | None:
        """Sizes and names, if they can be read."""
        if self.folder is None:
            return None
        with self.findings.collecting():
            config = read_json(self.folder / "config.json")
            if family_of(config) is None:
                return Checkpoint(self.folder).arch
            return architecture_from_config(config)
        return None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None if it cannot be read, or has still to be converted."""
        if self.folder is None or not (self.folder / "tokenizer.json").is_file():
            return None
        with self.findings.collecting():
            return Tokenizer(self.folder)
        return None

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """The names and shapes of the tensors, if they can be read."""
        if self.folder is None or self.arch is None:
            return None
        with self.findings.collecting():
            return Checkpoint(self.folder)
        return None

    def _check_adapter(self) -> None:
        from quantline.ingest.lora import Adapter

        adapter = self.params.model.adapter
        if adapter is None:
            return
        if not Path(adapter).is_dir():
            problem = f"model.adapter: expected the folder of an adapter at {adapter}, found none"
            self.findings.problems.append(
                StageError(Failure.MISSING_FILE, f"{problem}; correct the path")
            )
        elif self.checkpoint is not None:
            with self.findings.collecting():
                Adapter(Path(adapter), self.checkpoint)

    def _check_lengths(self) -> None:
        if self.arch is None:
            return
        speed = self.params.evaluation.speed
        lengths = {
            "calibration.length": self.params.calibration.length,
            "evaluation.length": self.params.evaluation.length,
        }
        if learned_positions(self.arch) is None:
            lengths["evaluation.speed.prompt_tokens"] = speed.prompt_tokens
            lengths["evaluation.speed.new_tokens"] = speed.new_tokens
        for key, length in lengths.items():
            with self.findings.collecting():
                self._warn(check_length(self.arch, key, length))
        with self.findings.collecting():
            check_speed(speed, learned_positions(self.arch))

    def _warn(self, warning: str | None) -> None:
        if warning:
            self.findings.warnings.append(warning)

    def _documents(self, section: str, text: Text) -> list[Document] | None:
        """Return a text's documents, if they are in a file and fill a sequence."""
        if text.source == "hub":
            return None
        with self.findings.collecting(), _named(section):
            documents = read_documents(text)
            if warning := misnamed(text):
                self._warn(f"{section}: {warning}")
            if self.tokenizer is not None:
                self.tokenizer.pack(documents, text.sequences, text.length)
            return documents
        return None

    def _gold(self) -> list[GoldItem]:
        gold = self.params.evaluation.gold
        items: list[GoldItem] = []
        if gold is None:
            return items
        with self.findings.collecting(), _named("evaluation.gold"):
            items = load_gold(Path(gold))
            if self.tokenizer is not None:
                tokenized = tokenize_items(items, self.tokenizer)
                if self.arch is not None:
                    lengths = {}
                    for item, tokens in zip(items, tokenized, strict=True):
                        lengths[item.label] = tokens.longest
                    self._warn(check_item_lengths(self.arch, lengths))
        return items

    def _check_smoke_prompts(self) -> None:
        for prompt in self.params.evaluation.smoke_prompts:
            if self.tokenizer is not None:
                with self.findings.collecting():
                    prompt_ids(self.tokenizer, prompt)

    def _check_recipes(self) -> None:
        for name, recipe in self.params.recipes.items():
            if self.checkpoint is not None:
                with self.findings.collecting(), _named(f"recipes.{name}"):
                    converter = self.params.model.converter
                    self._warn(check_recipe(name, recipe, self.checkpoint, converter))


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Say which part of params.yaml a problem is about."""
    try:
        yield
    except StageError as error:
        raise StageError(error.failure, f"{section}: {error}", error.reason) from error


def check_inputs(params: Params, warn: Callable[[str], None]) -> Findings:
    """Check all that the user supplies.

    Args:
        params: The content of params.yaml.
        warn: Takes each warning.

    Returns:
        What was found, without problems.

    Raises:
        StageError: With all problems.
    """
    findings = InputCheck(params).run()
    findings.raise_problems()
    for warning in findings.warnings:
        warn(warning)
    return findings
