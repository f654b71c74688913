"""What may be printed, logged and kept: text without secrets, and without control characters.

Messages quote what others wrote: names in a checkpoint, lines of a gold set, errors of libraries.
Whatever quantline prints goes through `say`, and whatever it keeps through `without_secrets`.
"""

import io
import logging
import os
import re
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterable
from functools import lru_cache
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import quote, quote_plus

HIDDEN = "***"
LONGEST = 8000  # characters of a message
SHORTEST_SECRET = 6  # of a variable's value; shorter ones would mask ordinary words

# Names of environment variables whose values are secrets, and of those that only say where one is.
SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASS|PASSWORD|PASSWD|PGPASSWORD|PWD|APIKEY|API_KEY|ACCESS_KEY|"
    r"PRIVATE_KEY|SECRET_KEY|ACCOUNT_KEY|STORAGE_KEY|CREDENTIALS?|SAS)(?:$|_)"
)
PLACE_NAME = re.compile(r"(?:_FILE|_PATH|_DIR|^PWD|^OLDPWD|^GOOGLE_APPLICATION_CREDENTIALS)$")

# In an address: user and password, also where the password has an @ or a slash in it.
CREDENTIALS = re.compile(r"(\b[A-Za-z][\w+.-]*://)(?:[^\s/@:]*:(?!\d+[/\s])[^\s\"']*@|[^\s/@]+@)+")
# In its query or fragment: what grants access.
QUERY = re.compile(
    r"([?&;#](?:amp;)?[\w.-]*(?:token|secret|passw|pwd|key|credential|signature|auth|sas)[\w.-]*=|"
    r"[?&;#](?:amp;)?(?:sig|code|pass)=)[^&\s\"'<>;#)]+",
    re.IGNORECASE,
)
HEADER = re.compile(
    r"((?:proxy-)?authorization|x-api-key|api-key|x-amz-security-token|(?:set-)?cookie)"
    r"([\"']?\s*[:=]\s*b?[\"']?)(?:(?:bearer|basic|token|digest|negotiate)\s+)?[^\"'\n\r]+",
    re.IGNORECASE,
)
BEARER = re.compile(r"\b(bearer\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
ASSIGNED = re.compile(
    r"(\b(?:[A-Z0-9]+_)*(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|APIKEY|ACCESS_KEY(?:_ID)?|"
    r"SECRET_KEY|PRIVATE_KEY|PGPASSWORD)[\"']?\s*[=:]\s*[\"']?|"
    r"(?i:\b(?:password|passwd|client_secret|api_?key|secret_?key|access_?key|"
    r"(?:access|refresh|auth|id)_token)[\"']?\s*[=:]\s*[\"']?))[^\s\"',;&)}\]]+"
)
# Tokens that show by their form what they are: of the Hub, GitHub, GitLab, AWS, Google,
# Databricks, Slack, OpenAI and its like, and signed ones (JWT).
TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|"
    r"github_pat_\w{20,}|glpat-[\w-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{30,}|"
    r"dapi[0-9a-f]{32}|xox[abprs]-[\w-]{10,}|sk-[\w-]{20,}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,})"
)


def secrets_of_environment() -> dict[str, str]:
    """Return the values of variables that hold secrets, in each form that an address has.

    Returns:
        Value → name of the variable, the longest first, for one may be a part of another.
    """
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if not _names_a_secret(name):
            continue
        if len(value) >= SHORTEST_SECRET and value.lower() != "false":
            forms = (value, quote(value), quote(value, safe=""), quote_plus(value))
            found |= dict.fromkeys(forms, name)
    return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))


def without_secrets(text: object, secrets: Iterable[str] | None = None) -> str:
    """Return a text without credentials, whatever form they have.

    That is: user and password in an address, tokens and signatures in its query, headers that
    authorize, tokens that can be told by their form, and the values of environment variables such
    as HF_TOKEN, AWS_SECRET_ACCESS_KEY and MLFLOW_TRACKING_PASSWORD.

    Args:
        text: The text.
        secrets: What `secrets_of_environment` found; None looks now.
    """
    clean = str(text)
    for secret in secrets_of_environment() if secrets is None else secrets:
        clean = clean.replace(secret, HIDDEN)
    clean = CREDENTIALS.sub(r"\1", clean)
    clean = QUERY.sub(rf"\1{HIDDEN}", clean)
    clean = HEADER.sub(rf"\1\2{HIDDEN}", clean)
    clean = BEARER.sub(rf"\1{HIDDEN}", clean)
    clean = ASSIGNED.sub(rf"\1{HIDDEN}", clean)
    return TOKENS.sub(HIDDEN, clean)


def redacted(value: Any) -> Any:
    """Return a JSON value whose texts, keys included, hold no credentials."""
    return _redacted(value, secrets_of_environment())


def _redacted(value: Any, secrets: Iterable[str]) -> Any:
    if isinstance(value, str):
        return without_secrets(value, secrets)
    if isinstance(value, dict):
        return {_redacted(key, secrets): _redacted(one, secrets) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(entry, secrets) for entry in value]
    return value


def variable_in(text: str) -> str | None:
    """Return the name of an environment variable whose secret value a text has; None if none."""
    secrets = secrets_of_environment()
    return next((name for secret, name in secrets.items() if secret in text), None)


@lru_cache(maxsize=4096)
def _names_a_secret(variable: str) -> bool:
    upper = variable.upper()
    return bool(SECRET_NAME.search(upper)) and not PLACE_NAME.search(upper)


def printable(text: object) -> str:
    r"""Return a text as a terminal may show it: line by line, left to right, and nothing else.

    Control characters (escape sequences, carriage return, bell, C1), overrides of the direction of
    text, and halves of characters are written as Python writes them: \x1b, \u202e, \ud800.
    """
    return "".join(map(_shown, str(text)))


@lru_cache(maxsize=4096)
def _shown(character: str) -> str:
    if character in "\n\t\u200c\u200d":  # the last two join letters and emoji
        return character
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        code = ord(character)
        if code < 0x100:
            return f"\\x{code:02x}"
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character


def shortened(text: str, longest: int = LONGEST) -> str:
    """Return a text of at most so many characters, with the number of those that were left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}… ({len(text) - longest:,} more characters)"


def plain(text: object) -> str:
    """Return a text as it may be shown to anybody, on anything."""
    return printable(without_secrets(text))


def in_markdown(text: object) -> str:
    """Return a text for one line of Markdown: no HTML, links, images, or borders of tables."""
    line = " ".join(plain(text).split())
    line = re.sub(r"[\\|\[\]*]", r"\\\g<0>", line)
    # `<` and `&` begin HTML only before these; `mean_kld <= 0.1` stays as it is.
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)
    return re.sub(r"&(?=#|[A-Za-z]+;)(?!lt;)", "&amp;", line)


def say(text: object, *, error: bool = False) -> None:
    """Print a line, to stderr if it tells of an error.

    All that quantline prints goes through here, besides its tables.
    """
    stream: TextIO = sys.stderr if error else sys.stdout
    line = plain(text)
    try:
        print(line, file=stream, flush=True)
    except UnicodeEncodeError:  # a terminal of another encoding
        encoding = stream.encoding or "ascii"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def guard_libraries() -> None:
    """Let what libraries log, warn of, and leave uncaught reach a terminal as `say` would."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a table on a terminal of another encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    make = logging.getLogRecordFactory()
    if not getattr(make, "guards", False):

        def record(*arguments: Any, **options: Any) -> logging.LogRecord:
            made = make(*arguments, **options)
            try:
                made.msg = plain(made.getMessage())
            except Exception:  # logging itself reports arguments that do not fit
                return made
            made.args = ()
            return made

        record.guards = True  # type: ignore[attr-defined]
        logging.setLogRecordFactory(record)
    warnings.showwarning = _show_warning
    sys.excepthook = _show_uncaught


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    text = warnings.formatwarning(message, category, filename, lineno, line)
    print(plain(text), end="", file=file or sys.stderr)


def _show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)
