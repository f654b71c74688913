"""What is printed and kept: no secret in any form, and nothing that moves a terminal."""

import ast
import json
import logging
import subprocess
import sys

import pytest

from quantline.config.compose import load_params
from quantline.errors import ConfigError, Failure
from quantline.messages import plain, printable, redacted, say, shortened, without_secrets
from quantline.run.stage import stage_run
from tests.helpers.project import ROOT

SECRET = "Tr0ub4dor"  # of no form that could be told by itself


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("to https://ada:Tr0ub4dor@example.org/api failed", "to https://example.org/api failed"),
        ("https://ada:Tr0@ub/4dor@example.org/x", "https://example.org/x"),
        ("postgresql+psycopg2://ada:Tr0ub4dor@db:5432/x", "postgresql+psycopg2://db:5432/x"),
        ("https://Tr0ub4dor@example.org", "https://example.org"),
        ("http://host:80/mail/a@b.org", "http://host:80/mail/a@b.org"),
        ("GET /a?token=Tr0ub4dor&b=2", "GET /a?token=***&b=2"),
        ("x?a=1&amp;sig=Tr0ub4dor", "x?a=1&amp;sig=***"),
        ("s3?X-Amz-Signature=Tr0ub4dor&X-Amz-Date=1", "s3?X-Amz-Signature=***&X-Amz-Date=1"),
        ("s3?X-Amz-Credential=Tr0ub4dor/20", "s3?X-Amz-Credential=***"),
        ("?X-Amz-Security-Token=Tr0ub4dor", "?X-Amz-Security-Token=***"),
        ("gs?X-Goog-Signature=Tr0ub4dor", "gs?X-Goog-Signature=***"),
        ("page#access_token=Tr0ub4dor", "page#access_token=***"),
        ("{'Authorization': 'Basic Tr0ub4dor', 'a': 1}", "{'Authorization': '***', 'a': 1}"),
        ('"authorization": "Bearer Tr0ub4dor"', '"authorization": "***"'),
        ("Authorization: token Tr0ub4dor\nok", "Authorization: ***\nok"),
        ("Cookie: session=Tr0ub4dor; b", "Cookie: ***"),
        ("with bearer Tr0ub4dor now", "with bearer *** now"),
        ("host=db password=Tr0ub4dor dbname=x", "host=db password=*** dbname=x"),
        ("MLFLOW_TRACKING_PASSWORD=Tr0ub4dor", "MLFLOW_TRACKING_PASSWORD=***"),
        ("AWS_SECRET_ACCESS_KEY: 'Tr0ub4dor'", "AWS_SECRET_ACCESS_KEY: '***'"),
        ("is hf_abcdefghijklmnopqrstuvwx gone", "is *** gone"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("ghp_abcdefghijklmnopqrst012345", "***"),
    ],
)
def test_without_secrets_knows_every_form(text, clean):
    assert without_secrets(text) == clean
    assert SECRET not in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "expected eos_token '</s>', found max_tokens: 24; tokens=5",
        "set HF_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        "see https://example.org/a?page=2#part, or sqlite:////abs/mlflow.db",
        "tags.`quantline.key` = 'model:0a'; mail ada@example.org",
        "basic information about hf_hub and sk-learn",
    ],
)
def test_without_secrets_leaves_other_text_alone(text):
    assert without_secrets(text) == text
    assert plain(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "my_api_key"]
)
def test_without_secrets_knows_the_environments_values(name, monkeypatch):
    monkeypatch.setenv(name, "s3cr/t value")
    assert without_secrets("a s3cr/t value here") == "a *** here"
    assert without_secrets("x=s3cr%2Ft%20value") == "x=***"
    assert redacted({"a": ["s3cr/t value", 1], "s3cr/t value": None}) == {
        "a": ["***", 1],
        "***": None,
    }


def test_without_secrets_takes_switches_and_places_for_no_secrets(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sevenletters")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/ada/token")
    assert without_secrets("sevenletters /home/ada/token") == "sevenletters /home/ada/token"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("all well\rfailed", "all well\\x0dfailed"),
        ("a\x08\x7f\x9b2Jb\x00", "a\\x08\\x7f\\x9b2Jb\\x00"),
        ("\u202egnp.exe\u2066x\u200f", "\\u202egnp.exe\\u2066x\\u200f"),
        ("half \ud83d\u2028", "half \\ud83d\\u2028"),
        ("\U000e0041", "\\U000e0041"),
        ("äß 中文 👩\u200d💻\tx\ny", "äß 中文 👩\u200d💻\tx\ny"),
    ],
)
def test_printable_shows_what_would_move_a_terminal(text, shown):
    assert printable(text) == shown


def test_shortened_says_how_much_is_left_out():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcdef", 3) == "abc… (3 more characters)"


def test_say_prints_in_any_encoding(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        say("Größe \x1b")
    assert (tmp_path / "out").read_text() == "Gr\\xf6\\xdfe \\x1b\n"


def test_no_other_place_prints():
    """`say` and the table of the report are the only ones."""
    places = []
    for root in ("quantline", "stages"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                prints = called in ("print", "typer.echo", "typer.secho", "traceback.print_exc")
                if prints or called in ("sys.stdout.write", "sys.stderr.write"):
                    places.append(path.relative_to(ROOT).as_posix())
    assert set(places) == {"quantline/messages.py"}


def test_guard_libraries_covers_logs_warnings_and_what_nobody_caught():
    code = (
        "import logging, warnings, stages\n"
        "logging.getLogger('x').warning('log %s', '\\x1b[1m?token=abcdef')\n"
        "logging.getLogger('x').warning('100 % of %s')\n"
        "warnings.warn('warned \\x1b[2m')\n"
        "raise ValueError('uncaught \\x1b[3m //')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "\x1b" not in done.stderr and "abcdef" not in done.stderr
    for shown in ("log \\x1b[1m?token=***", "100 % of %s", "warned \\x1b[2m", "uncaught \\x1b[3m"):
        assert shown in done.stderr
    assert logging.getLogRecordFactory()  # in this process it is the same one for all tests


def test_a_stage_keeps_and_prints_neither_secrets_nor_control_characters(
    project, capfd, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(SystemExit), stage_run("load") as run:
        run.event("warning", f"to https://a:{SECRET}@b.org", payload={"seen": f"\x9b{SECRET}"})
        raise ValueError(f"\x1b[2J Authorization: Basic {SECRET}\r\u202e" + "x" * 20_000)
    printed = capfd.readouterr()
    raw = (project.root / "events.jsonl").read_bytes()
    for text in (printed.out + printed.err, raw.decode()):
        assert SECRET not in text
        assert not set("\x1b\r\x9b\u202e") & set(text)
    assert len(printed.err) < 60_000
    warned, failed = project.events()[-2:]
    assert warned["payload"]["seen"] == "\x9b***"  # JSON's own escapes lose nothing
    assert failed["payload"]["failure"] == Failure.INTERNAL_ERROR
    assert "***" in failed["payload"]["traceback"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"tracking.uri=https://ada:{SECRET}@example.org", "MLFLOW_TRACKING_PASSWORD"),
        (f"tracking.uri=postgresql://ada:{SECRET}@db/x", "~/.pgpass"),
        (f"tracking.uri='https://example.org/?token={SECRET}'", "no credentials in the address"),
        (f"model.path='https://x/y?sig={SECRET}'", "model.path: expected no credentials"),
        ("model.path=${oc.env:HF_TOKEN}", "model.path: expected no credentials"),
        ('evaluation.smoke_prompts=["${oc.env:HF_TOKEN}"]', "evaluation.smoke_prompts"),
        ("tracking.uri=file:/etc", "expected an address that begins with one of sqlite"),
        ("tracking.uri=databricks", "expected an address that begins with one of sqlite"),
    ],
)
def test_compose_refuses_credentials_and_strange_stores(project, monkeypatch, override, words):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = (project.root / "params.yaml").read_text()
    with pytest.raises(ConfigError) as error:
        project.compose(override)
    assert words in str(error.value)
    assert SECRET not in str(error.value)
    assert (project.root / "params.yaml").read_text() == before


def test_a_variable_whose_secret_is_an_ordinary_word_is_named(project, monkeypatch):
    monkeypatch.setenv("REDIS_PASSWORD", "gguf-q4_k_m")
    with pytest.raises(ConfigError, match=r"variable REDIS_PASSWORD: .* unset the variable"):
        load_params()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x,x,x,x,x,x,x,x,x]\n", "more"),
        ("recipes: &loop {x: *loop}\n", "contains itself"),
        ("model: !!python/object/apply:os.system ['touch pwned']\n", "python/object"),
    ],
)
def test_load_params_bounds_what_yaml_can_blow_up(project, text, words):
    if "more" in words:
        levels = [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n"
                  for n in range(9)]  # fmt: skip
        text += "".join(levels)
    path = project.root / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_params(path)
    assert not (project.root / "pwned").exists()


def test_events_are_json_with_every_character(project):
    text = "a\x85\x9b\u2028\u202e\ufeffé"
    with stage_run("load") as run:
        run.event("info", text)
    lines = (project.root / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["summary"] == text
