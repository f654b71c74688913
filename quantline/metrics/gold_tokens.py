"""The items of a gold set as token ids, as the model reads prompt and answer together."""

from itertools import combinations

from quantline.errors import Failure, Reason, StageError
from quantline.metrics.gold_items import GoldItem
from quantline.metrics.gold_set import MAX_TOKENS, TokenizedItem
from quantline.text.join import encode_join
from quantline.text.text_file import listing
from quantline.text.tokenizer import Tokenizer

SHOWN = 10  # items in one message


class ItemTokenizer:
    """Turns gold items into token ids, and keeps a list of those that it cannot.

    Attributes:
        problems: What is wrong with which item.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Take the tokenizer of the model."""
        self.tokenizer = tokenizer
        self.problems: list[str] = []
        candidates = (tokenizer.bos, *tokenizer.end_tokens)
        self._prefix = next((token for token in candidates if token is not None), None)

    def tokenize(self, item: GoldItem) -> TokenizedItem | None:
        """Return an item as token ids; None, with the reason in `problems`, if it has none."""
        tokenizer = self.tokenizer
        try:
            text = tokenizer.render(item.chat, True) if item.chat else item.prompt
        except StageError as error:
            self._refuse(item, str(error))
            return None
        choices = item.choices or [item.answer]
        pairs = [self._encode(item, text, choice) for choice in choices]
        prompt = pairs[0][0]
        continuations = [continuation for _, continuation in pairs]
        if not self._is_sound(item, text, choices, prompt, continuations):
            return None
        if item.generated:
            # The model continues the prompt as it is, spaces at its end included.
            prompt = self._ids(item, text) or prompt
            choices, continuations = [], []
        divisors = [1] * len(choices)
        if item.normalize == "tokens":
            divisors = [len(tokens) for tokens in continuations]
        elif item.normalize == "length":
            divisors = [len(choice) for choice in choices]
        return TokenizedItem(
            id=item.id,
            task=item.task,
            text=text,
            reference=item.answer,
            kind=item.kind,
            prompt=prompt,
            continuations=continuations,
            answer=choices.index(item.answer) if choices else 0,
            divisors=divisors,
            match=item.match,
            stop=item.stop,
            max_tokens=item.max_tokens or MAX_TOKENS,
            end=list(tokenizer.end_tokens),
        )

    def _ids(self, item: GoldItem, text: str) -> list[int]:
        """Return the ids of a text as the model reads it."""
        # A template writes the begin token itself.
        return self.tokenizer.encode(text) if item.chat else self.tokenizer.prompt(text)

    def _encode(self, item: GoldItem, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of what follows it."""
        if text.strip():
            return encode_join(lambda part: self._ids(item, part), text, answer)
        prefix = [] if self._prefix is None else [self._prefix]
        return prefix, self.tokenizer.encode(text + answer)

    def _meant(self, item: GoldItem, text: str, answer: str) -> str:
        """Return what the ids of a prompt with its answer say."""
        whole = text + answer
        if text.strip():
            return self.tokenizer.decode(self._ids(item, whole))
        prefix = [] if self._prefix is None else [self._prefix]
        return self.tokenizer.decode(prefix + self.tokenizer.encode(whole))

    def _is_sound(
        self,
        item: GoldItem,
        text: str,
        choices: list[str],
        prompt: list[int],
        continuations: list[list[int]],
    ) -> bool:
        """Check that the ids say the answers, and that no two of them are alike."""
        before = len(self.problems)
        if not prompt:
            self._refuse(item, "its prompt has no token")
        if item.match == "regex":  # the answer is no text
            return len(self.problems) == before
        for choice, continuation in zip(choices, continuations, strict=True):
            said = self.tokenizer.decode(prompt + continuation)
            if item.generated:  # nothing is joined to the prompt
                ids = self.tokenizer.encode(choice.strip())
                is_said = choice.strip() in self.tokenizer.decode(ids)
                most = item.max_tokens or MAX_TOKENS
                if len(ids) > most + 1:  # one of them may be written with what is before
                    self._refuse(
                        item,
                        f"its answer takes {len(ids)} tokens, and {most} are generated, so that "
                        "none could be right; set max_tokens",
                    )
            else:
                # Ids that end with the answer can still say another text where the two meet. White
                # space there may go, as with the harness: a token can hold it with what is before.
                meant = self._meant(item, text, choice)
                is_said = bool(continuation) and said.endswith(choice)
                is_said = is_said and "".join(said.split()) == "".join(meant.split())
            if not is_said:
                tail = said[-len(choice) - 10 :]
                self._refuse(
                    item,
                    f"expected ids that say the answer {choice!r} after its prompt, found ids that "
                    f"say …{tail!r}: the tokenizer cannot write it, or joins its beginning with "
                    "the end of the prompt; word it otherwise, or begin it with a space",
                )
        for (one, ids), (other, other_ids) in combinations(
            zip(choices, continuations, strict=True), 2
        ):
            if ids == other_ids:
                self._refuse(
                    item,
                    f"the choices {one!r} and {other!r} are the same {len(ids)} tokens; word one "
                    "of them otherwise",
                )
        return len(self.problems) == before

    def _refuse(self, item: GoldItem, problem: str) -> None:
        self.problems.append(f"{item.label}: {problem}")


def tokenize_items(items: list[GoldItem], tokenizer: Tokenizer) -> list[TokenizedItem]:
    """Return gold items as token ids.

    Raises:
        StageError: dataset_invalid, with every item whose answer the tokenizer cannot write, whose
            choices have equal tokens, or whose messages the chat template refuses.
    """
    reader = ItemTokenizer(tokenizer)
    tokenized = [reader.tokenize(item) for item in items]
    if reader.problems:
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected items that can be scored, found {listing(reader.problems, SHOWN)}",
            Reason.EVAL_DATASET_MISSING,
        )
    return [item for item in tokenized if item is not None]
