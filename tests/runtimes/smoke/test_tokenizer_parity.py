"""Token ids of a bundle are compared on texts that the source can represent."""

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from quantline.runtimes.smoke.tokenizer_parity import (
    TEXTS,
    compare_tokenizers,
    texts_with_added_tokens,
)
from quantline.text.tokenizer import Tokenizer
from tests.helpers.tokenizers import write_sentencepiece


class Shifted:
    """A runtime whose ids are wrong for texts with a word."""

    def __init__(self, source, word):
        self.source = source
        self.word = word

    def encode(self, text):
        ids = self.source.encode(text)
        return [token + 1 for token in ids] if self.word in text else ids


def test_compare_tokenizers_lists_the_texts_that_differ(tiny_model):
    source = Tokenizer(tiny_model)
    parity = compare_tokenizers(Shifted(source, "fox"), source)
    assert parity.compared == len(TEXTS)
    assert parity.differing == [text for text in TEXTS if "fox" in text]
    assert len(parity.differing) == 1


def test_compare_tokenizers_leaves_out_what_the_source_cannot_represent(tmp_path):
    folder = write_sentencepiece(tmp_path / "model", "llama 2")
    path = folder / "tokenizer.json"
    fast = FastTokenizer.from_file(str(path))
    fast.model.byte_fallback = False
    fast.save(str(path))
    source = Tokenizer(folder)
    texts = ("The river", "🜁")  # a character that the corpus lacks
    assert source.special("unk_token") in source.encode(texts[1])
    assert compare_tokenizers(Shifted(source, "e"), source, texts) == (["The river"], 1)


def test_texts_with_added_tokens_has_each_alone_inside_and_between(tmp_path, tiny_model):
    path = tmp_path / "tokenizer.json"
    fast = FastTokenizer.from_file(str(tiny_model / "tokenizer.json"))
    fast.add_tokens([AddedToken("▁▁x", normalized=False)])
    fast.save(str(path))
    texts = texts_with_added_tokens(Tokenizer(tmp_path))
    assert len(texts) == 3 * 4
    assert {"<|im_end|>", "a<|im_end|>b", "so <|im_end|> there  <|im_end|>\n x"} <= set(texts)
    assert "  x" in texts
