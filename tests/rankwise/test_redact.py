"""Secrets of the environment reach no file of ours."""

import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from rankwise import redact as redact_module
from rankwise.redact import make_live_redactor, redact, redact_command


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "aws_secret_access",
        "DB_PASSWORD",
        "DB_PASSWD",
        "MY_CREDENTIALS",
        "PROXY_AUTH",
        "KEY",
    ],
)
def test_value_of_a_variable_that_speaks_of_a_secret_is_hidden(name: str) -> None:
    assert redact("sent s3cr3t-value!", {name: "s3cr3t-value"}) == "sent ***!"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME", "PWD", "HOME", "KEYBOARD_LAYOUT"])
def test_value_of_another_variable_stays(name: str) -> None:
    assert redact("in /home/somebody", {name: "/home/somebody"}) == "in /home/somebody"


def test_short_values_stay_since_they_stand_in_many_lines() -> None:
    assert redact("step 1234 true", {"API_KEY": "1234", "USE_TOKEN": "true", "TOKEN": ""}) == "step 1234 true"


def test_secret_that_begins_with_another_is_hidden_whole() -> None:
    environ = {"A_TOKEN": "12345678", "B_TOKEN": "12345678-and-more"}
    assert redact("12345678-and-more 12345678", environ) == "*** ***"


def test_password_in_an_address_is_hidden() -> None:
    assert redact("GET https://me:hunter2@host/a?b", {}) == "GET https://***@host/a?b"
    assert redact("mail me@host, see https://host/a", {}) == "mail me@host, see https://host/a"


def test_options_of_a_command_hide_what_they_are_given() -> None:
    command = [
        "train.py",
        "--api-key=abc",
        "--hub-token",
        "abc",
        "--steps=3",
        "--password",
        "--lr",
        "1e-3",
        "abc-env-abc",
    ]
    assert redact_command(command, {"X_TOKEN": "abc-env-abc"}) == [
        "train.py", "--api-key=***", "--hub-token", "***", "--steps=3", "--password", "--lr", "1e-3", "***",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["sent s3cr3t\tvalue!", "sent s3cr3t\\tvalue!", "sent s3cr3t\tvalue\n!"])
def test_secret_is_hidden_without_its_newline_and_as_repr_shows_it_too(text: str) -> None:
    assert redact(text, {"HF_TOKEN": "s3cr3t\tvalue\n"}) == "sent ***!"


def test_live_redactor_knows_new_variables_at_once_and_new_values_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HOME": "/home/somebody", "A_TOKEN": "first-value"}
    clean = make_live_redactor(environ)
    environ["B_TOKEN"] = "second-value"
    assert clean("first-value second-value") == "*** ***"
    environ["B_TOKEN"] = "third-value"
    monkeypatch.setattr(redact_module, "REFRESH_SECONDS", -1.0)
    assert clean("first-value third-value") == "*** ***"


def test_secret_is_hidden_as_json_and_addresses_write_it() -> None:
    environ = {"CLOUD_CREDENTIALS": '{"private": "a\u00e9/b+c=="}'}
    assert redact(json.dumps(environ), environ) == '{"CLOUD_CREDENTIALS": "***"}'
    assert redact(json.dumps(environ, ensure_ascii=False), environ) == '{"CLOUD_CREDENTIALS": "***"}'
    assert redact(f"GET /?token={quote('ab+c/de==', safe='')}", {"A_TOKEN": "ab+c/de=="}) == "GET /?token=***"


def test_short_value_is_hidden_beside_its_name() -> None:
    environ = {"DB_PASSWORD": "hunter2\n", "HOME": "/home/somebody", "EMPTY_KEY": " "}
    assert redact("DB_PASSWORD=hunter2 DB_PASSWORD: hunter2, EMPTY_KEY= ", environ) == (
        "DB_PASSWORD=*** DB_PASSWORD: ***, EMPTY_KEY= "
    )
    assert redact(str({"DB_PASSWORD": "hunter2"}), environ) == "{'DB_PASSWORD': '***'}"
    assert redact(str([("DB_PASSWORD", "hunter2")]), environ) == "[('DB_PASSWORD', '***')]"
    assert redact("OTHER_DB_PASSWORD=hunter2 hunter2 DB_PASSWORD=hunter22", environ) == (
        "OTHER_DB_PASSWORD=hunter2 hunter2 DB_PASSWORD=hunter22"
    )


def test_variable_that_is_taken_away_meanwhile_costs_nothing() -> None:
    class Shrinking(dict[str, str]):
        def __iter__(self) -> Iterator[str]:
            names = list(super().__iter__())
            self.pop("A_TOKEN", None)
            return iter(names)

    assert redact("first-value second-value", Shrinking(A_TOKEN="first-value", B_TOKEN="second-value")) == (
        "first-value ***"
    )
