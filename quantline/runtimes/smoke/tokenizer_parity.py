"""Does a bundle's own tokenizer give the same ids as the source's?"""

from collections.abc import Iterable
from typing import NamedTuple

from quantline.runtimes.runtime import Runtime
from quantline.text.tokenizer import Tokenizer

# Prose in several scripts, code, numbers, white space and emoji: where pre-tokenizers differ.
TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 3.14159 o'clock. THEY'RE "
    "sure WE'LL see, aren't they?",
    "When Mr. Utterson (of No. 42b, Gaunt-Street) had slept, he'd say: \"If he be Mr. "
    'Hyde, I shall be Mr. Seek!" --- said so.',
    "  two  spaces,\ttab,\nnew line\n\n and trailing ",
    "\n\n\nThree new lines, then\r\nWindows\r\n\r\n   and\t\t\ttabs   \n   \n x",
    'def f(x: int) -> str:\n    return f"{x:>8}"  # code\n\n\nclass A(B):\n\tdef '
    "__init__(self, *args, **kw): super().__init__()\n",
    "for (size_t i = 0; i < n_items; ++i) { a[i] |= mask << 2u; } // 0xFFu\r\n#include "
    '<vector>\n<div class="x">&nbsp;</div>',
    "SELECT * FROM t WHERE id >= 10 AND name LIKE '%x%'; {\"k\": [1, -2.5e-3, null, "
    "true]} https://example.org/a_b?c=d&e=%20#f",
    "1234567890 1,000,000.50 0x1F 2² 12345 678 9 ½ ① Ⅷ ٣٤٥ १२३ ４５６ 2024-05-01T12:30:45Z "
    "+49 (30) 123-45-67",
    "Ελληνικά: ο ήλιος ανατέλλει πάντα από την ανατολή.",
    "Русский язык: все счастливые семьи похожи друг на друга, Иван!",
    "עברית: בְּרֵאשִׁית ברא אלהים את השמים ואת הארץ.",
    "العربية: مرحبا بالعالم، كيف حالُكَ اليوم؟",
    "हिन्दी: सभी मनुष्यों को गौरव और अधिकारों के मामले में स्वतन्त्रता प्राप्त है।",
    "ภาษาไทย: ภาษาไทยไม่มีช่องว่างระหว่างคำ ที่นี่",
    "中文字符与标点。你好，世界！",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 문장입니다. 모든 인간은 자유롭다.",
    "naïve café œuvre Größe Ångström — “quotes” … № ½ İstanbul fiancée’s",
    "Tiếng Việt: Tất cả mọi người sinh ra đều được tự do.",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 🚀🚀 👍🏽 ❤️ ©️",
    "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, ∑ αᵢ ≤ ∫ f dμ → ∞ €£¥ ™®",
)


class Parity(NamedTuple):
    """How far two tokenizers agree.

    Attributes:
        differing: The texts that the bundle tokenizes otherwise than the source.
        compared: How many texts were compared.
    """

    differing: list[str]
    compared: int


def texts_with_added_tokens(source: Tokenizer) -> list[str]:
    """Return each added token of the source alone, inside a word, and between white space.

    Tokens of SentencePiece's space are written with the spaces that they stand for.
    """
    added = source.fast.get_added_tokens_decoder().values()
    contents = sorted(token.content.replace("▁", " ") for token in added)
    texts = []
    for token in contents:
        texts += [token, f"a{token}b", f"so {token} there  {token}\n x"]
    return texts


def compare_tokenizers(runtime: Runtime, source: Tokenizer, texts: Iterable[str] = TEXTS) -> Parity:
    """Compare the token ids of texts.

    A text that the source itself cannot represent (it has no bytes to fall back on) has no ids to
    agree on and is left out.
    """
    unknown = source.special("unk_token")
    differing = []
    compared = 0
    for text in texts:
        ids = source.encode(text)
        if unknown is not None and unknown in ids:
            continue
        compared += 1
        if runtime.encode(text) != ids:
            differing.append(text)
    return Parity(differing, compared)
