"""The tokenizer of a Hugging Face folder as GGUF metadata.

Two families: byte-level BPE ("gpt2" in GGUF, with the name of its pre-tokenizer) and SentencePiece-like BPE with byte
tokens ("llama"). Which one, and which pre-tokenizer, is read from tokenizer.json itself.

llama.cpp normalizes no text. Unicode's NFC, which many tokenizers ask for, is passed over as llama.cpp's converter
does: nearly all text is NFC already, and export compares token ids on text.
"""

from collections import Counter

import gguf
from gguf import TokenType

from quantline.model.checkpoint import read_json
from quantline.text.tokenizer import Tokenizer
from quantline.formats.gguf.pretokenizers import pre_tokenizer_names
from quantline.errors import Failure, StageError

SPACE = "▁"  # what SentencePiece writes for a space
PREPEND, REPLACE = ("Prepend", SPACE), ("Replace", " ", SPACE)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")  # that llama.cpp looks for in a file of that name


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Write tokens, their kinds, merges or scores, special tokens and the chat template.

    `rows` is the embedding's; ids that the tokenizer lacks become padding. Raises StageError(tokenizer_mismatch) for a
    tokenizer that llama.cpp has no equal of.
    """
    spec = read_json(tokenizer.folder / "tokenizer.json")
    model = spec["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} model")
    normalizers = list(_normalizers(spec.get("normalizer")))
    pieces = REPLACE in normalizers or (spec.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    tokens, kinds = _tokens(spec, rows, pieces)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if pieces:
        _add_sentencepiece(writer, spec, normalizers, tokens, merges)
    else:
        _add_byte_level(writer, spec, normalizers, merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        if (index := tokenizer.special(f"{role}_token")) is not None:
            add(index)
    writer.add_add_bos_token(tokenizer.bos is not None)
    writer.add_add_eos_token(tokenizer.fast.encode("a").ids[-1:] == [tokenizer.special("eos_token")])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def name_of(tokenizer: Tokenizer, recipe: str) -> str:
    """The model's name in the file. llama.cpp strips white space after special tokens, as Phi-3's do, if the name says
    phi-3, and has no other way to be told so; so no other model's name may.
    """
    added = read_json(tokenizer.folder / "tokenizer.json").get("added_tokens", [])
    strips = any(one.get("rstrip") for one in added) and {one["content"] for one in added}.issuperset(PHI3_TOKENS)
    return f"phi-3 {recipe}" if strips else recipe.replace("phi-3", "phi 3").replace("phi3", "phi 3")


def _tokens(spec: dict, rows: int, pieces: bool) -> tuple[list[str], list[TokenType]]:
    """Tokens and their kinds by id, padded to `rows`."""
    added, unknown = {one["id"]: one for one in spec.get("added_tokens", [])}, spec["model"].get("unk_token")
    there = {index: token for token, index in spec["model"]["vocab"].items()}
    if any(not 0 <= index < rows for index in (*there, *added)):
        raise StageError(Failure.TOKENIZER_MISMATCH, f"the tokenizer has ids beyond the embedding's {rows} rows")
    tokens, kinds = [], []
    for index in range(rows):
        if index in added:
            special, text = added[index].get("special"), added[index]["content"]
            # Tokens that llama.cpp finds in the text as it is, before spaces become ▁, have to have spaces themselves.
            tokens.append(text.replace(SPACE, " ") if pieces and not special else text)
            kinds.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif index in there:
            tokens.append(there[index])
            kinds.append(TokenType.BYTE if pieces and there[index] in BYTE_TOKENS else TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            kinds.append(TokenType.UNUSED)
        if pieces and tokens[-1] == unknown:
            kinds[-1] = TokenType.UNKNOWN
    twice = [token for token, count in Counter(tokens).items() if count > 1 or not token]
    if twice:  # llama.cpp would stop the whole process
        raise StageError(Failure.TOKENIZER_MISMATCH, f"expected tokens that differ and are not empty, found "
                         f"{twice[0]!r} {tokens.count(twice[0])} times; GGUF cannot hold this tokenizer")
    return tokens, kinds


def _normalizers(spec: dict | None) -> list[tuple]:
    """The steps of a `normalizer`, flat."""
    if not spec:
        return []
    if spec["type"] == "Sequence":
        return [step for one in spec["normalizers"] for step in _normalizers(one)]
    if spec["type"] == "Prepend":
        return [("Prepend", spec["prepend"])]
    if spec["type"] == "Replace":
        return [("Replace", spec["pattern"].get("String"), spec["content"])]
    return [(spec["type"],)]


def _add_byte_level(writer: gguf.GGUFWriter, spec: dict, normalizers: list[tuple],
                    merges: list[tuple[str, str]]) -> None:
    model, given = spec["model"], spec.get("pre_tokenizer")
    names, whole = pre_tokenizer_names(given), bool(model.get("ignore_merges"))
    if not names or not set(normalizers) <= {("NFC",)}:
        raise _unknown(f"pre_tokenizer {given} with normalizer {spec.get('normalizer')}")
    if any(" " in piece for pair in merges for piece in pair):
        raise _unknown("merges of pieces with spaces in them")
    stuck = _unreachable(spec, merges) if any(one != whole for _, one in names) else None
    name = next((name for name, one in names if one == whole or not stuck), None)
    if name is None:
        raise _unknown(f"ignore_merges {whole} with the pre-tokenizer {names[0][0]}, and {stuck!r}, which no merges "
                       "make")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in merges])


def _unreachable(spec: dict, merges: list[tuple[str, str]]) -> str | None:
    """A token that merges alone do not make of its text: only there does it matter whether words are taken whole."""
    from tokenizers.models import BPE

    vocabulary, added = spec["model"]["vocab"], {one["content"] for one in spec.get("added_tokens", [])}
    plain = BPE(vocabulary, merges)
    return next((token for token in sorted(vocabulary) if token not in added and len(plain.tokenize(token)) != 1), None)


def _add_sentencepiece(writer: gguf.GGUFWriter, spec: dict, normalizers: list[tuple], tokens: list[str],
                       merges: list[tuple[str, str]]) -> None:
    """SentencePiece BPE merges the pair with the highest score first; the rank of the merge is that order."""
    model, given = spec["model"], spec.get("pre_tokenizer") or {}
    # Gemma's: by then no spaces are left to split at.
    splits = given.get("type") == "Split" and given.get("pattern") == {"String": " "}
    if not set(normalizers) <= {PREPEND, REPLACE} or given.get("type") not in (None, "Metaspace", "Split") or \
            (given.get("type") == "Split" and not splits) or given.get("replacement", SPACE) != SPACE:
        raise _unknown(f"pre_tokenizer {given} with normalizer {spec.get('normalizer')}")
    lacking = [token for token in BYTE_TOKENS if token not in model["vocab"]]
    if model.get("byte_fallback") and lacking:
        raise _unknown(f"byte_fallback without the token {lacking[0]}")
    rank = {left + right: order for order, (left, right) in enumerate(reversed(merges))}
    top = len(rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([float(rank[token] - top) if token in rank else -float(top + 1) for token in tokens])
    prepends = PREPEND in normalizers or given.get("prepend_scheme") in ("always", "first")
    writer.add_add_space_prefix(prepends)


def _unknown(what: str) -> StageError:
    return StageError(Failure.TOKENIZER_MISMATCH,
                      f"expected byte-level BPE with a pre-tokenizer that llama.cpp knows, or BPE with ▁ for spaces and "
                      f"byte tokens; found {what}, for which llama.cpp has no equal here")
