"""Does a bundle's own tokenizer give the same ids as the source's?"""

from quantline.text.tokenizer import Tokenizer
from quantline.runtimes.runtime import Runtime

# Prose in several scripts, code, numbers, white space and emoji: where pre-tokenizers differ from each other.
TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 3.14159 o'clock. THEY'RE sure WE'LL see, aren't they?",
    "When Mr. Utterson (of No. 42b, Gaunt-Street) had slept, he'd say: \"If he be Mr. Hyde, I shall be Mr. Seek!\" --- said so.",
    "  two  spaces,\ttab,\nnew line\n\n and trailing ", "\n\n\nThree new lines, then\r\nWindows\r\n\r\n   and\t\t\ttabs   \n   \n x",
    "def f(x: int) -> str:\n    return f\"{x:>8}\"  # code\n\n\nclass A(B):\n\tdef __init__(self, *args, **kw): super().__init__()\n",
    "for (size_t i = 0; i < n_items; ++i) { a[i] |= mask << 2u; } // 0xFFu\r\n#include <vector>\n<div class=\"x\">&nbsp;</div>",
    "SELECT * FROM t WHERE id >= 10 AND name LIKE '%x%'; {\"k\": [1, -2.5e-3, null, true]} https://example.org/a_b?c=d&e=%20#f",
    "1234567890 1,000,000.50 0x1F 2² 12345 678 9 ½ ① Ⅷ ٣٤٥ १२३ ４５６ 2024-05-01T12:30:45Z +49 (30) 123-45-67",
    "Ελληνικά: ο ήλιος ανατέλλει πάντα από την ανατολή.", "Русский язык: все счастливые семьи похожи друг на друга, Иван!",
    "עברית: בְּרֵאשִׁית ברא אלהים את השמים ואת הארץ.", "العربية: مرحبا بالعالم، كيف حالُكَ اليوم؟",
    "हिन्दी: सभी मनुष्यों को गौरव और अधिकारों के मामले में स्वतन्त्रता प्राप्त है।", "ภาษาไทย: ภาษาไทยไม่มีช่องว่างระหว่างคำ ที่นี่",
    "中文字符与标点。你好，世界！", "日本語のテキスト、カタカナとひらがな。", "한국어 문장입니다. 모든 인간은 자유롭다.",
    "naïve café œuvre Größe Ångström — “quotes” … № ½ İstanbul fiancée’s", "Tiếng Việt: Tất cả mọi người sinh ra đều được tự do.",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 🚀🚀 👍🏽 ❤️ ©️", "∀x ∈ ℝ: ⌈x⌉ = −⌊−x⌋, ∑ αᵢ ≤ ∫ f dμ → ∞ €£¥ ™®",
)


def texts_of(source: Tokenizer) -> list[str]:
    """Texts with the source's added tokens: each alone, inside a word, and between white space.

    Tokens of SentencePiece's space are written with the spaces that they stand for.
    """
    added = sorted(token.content.replace("▁", " ") for token in source.fast.get_added_tokens_decoder().values())
    return [text for one in added for text in (one, f"a{one}b", f"so {one} there  {one}\n x")]


def mismatches(runtime: Runtime, source: Tokenizer, texts: tuple[str, ...] = TEXTS) -> tuple[list[str], int]:
    """(texts that the bundle tokenizes otherwise, number of texts compared).

    A text that the source itself cannot represent (it has no bytes to fall back on) has no ids to agree on and is
    left out.
    """
    unknown = source.special("unk_token")
    compared = [text for text in texts if unknown is None or unknown not in source.encode(text)]
    return [text for text in compared if runtime.encode(text) != source.encode(text)], len(compared)
