"""Values that nobody else may read, taken out of text before it is written."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import quote

MIN_LENGTH = 8
"""Shorter values are hidden only beside their names: "true" stands in many lines that say nothing about a secret."""

REFRESH_SECONDS = 1.0

_HIDDEN = "***"
# TOKENIZERS_PARALLELISM, KEYBOARD and GIT_AUTHOR_NAME hold no secrets.
_SECRET_NAME = re.compile(r"token(?!iz)|key(?!board)|secret|passw|passphrase|credential|auth(?!or(?!i))", re.IGNORECASE)
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
_ADDRESS_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with `***` for the value of every variable whose name speaks of a secret, and for passwords in URLs.

    A name does that with token, key, secret, passw(or)d, passphrase, credential or auth in it. Values as `repr`, JSON
    and URLs write them count too; those of fewer than 8 characters do only beside their names, as in `NAME=value`.

    Ranks: local.
    """
    return make_redactor(environ)(text)


def redact_command(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> list[str]:
    """A command line as `redact` leaves it, and with `***` for the values of options such as --api-key.

    Ranks: local.
    """
    clean = make_redactor(environ)
    told: list[str] = []
    is_secret = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        names_secret = bool(_OPTION.fullmatch(option) and _SECRET_NAME.search(option))
        if is_secret and not argument.startswith("-"):
            told.append(_HIDDEN)
        else:
            told.append(f"{option}={_HIDDEN}" if names_secret and equals else clean(argument))
        is_secret = names_secret and not equals
    return told


def make_live_redactor(environ: Mapping[str, str]) -> Callable[[str], str]:
    """`redact` for text of a long time: a new variable counts at once, another value of an old one within a second.

    Ranks: local.
    """
    clean, num_variables, made = make_redactor(environ), len(environ), time.monotonic()

    def clean_now(text: str) -> str:
        nonlocal clean, num_variables, made
        if len(environ) != num_variables or time.monotonic() - made > REFRESH_SECONDS:
            clean, num_variables, made = make_redactor(environ), len(environ), time.monotonic()
        return clean(text)

    return clean_now


def make_redactor(environ: Mapping[str, str]) -> Callable[[str], str]:
    """`redact` with the secrets that the environment holds now: cheap enough for every record.

    Ranks: local.
    """
    # The longest first: one secret may begin with another.
    values = _secret_values(environ)
    secrets = sorted(_forms(values.values()), key=len, reverse=True)
    short = {name: _beside(name, value.strip()) for name, value in values.items() if len(value.strip()) < MIN_LENGTH}

    def clean(text: str) -> str:
        for secret in secrets:
            if secret in text:
                text = text.replace(secret, _HIDDEN)
        for name, assigned in short.items():
            if name in text:
                text = assigned.sub(rf"\1{_HIDDEN}", text)
        return _ADDRESS_PASSWORD.sub(_HIDDEN, text) if "://" in text and "@" in text else text

    return clean


def _secret_values(environ: Mapping[str, str]) -> dict[str, str]:
    # One by one and by `get`: another thread may take variables away meanwhile.
    values = {name: environ.get(name, "") for name in list(environ) if _SECRET_NAME.search(name)}
    return {name: value for name, value in values.items() if value.strip()}


def _forms(values: Iterable[str]) -> set[str]:
    """The values, and how they look without a file's last newline, and as `repr`, JSON and URLs write them."""
    forms = {form for value in values for form in (value, value.strip()) if len(form.strip()) >= MIN_LENGTH}
    for form in list(forms):
        forms |= {repr(form)[1:-1], json.dumps(form)[1:-1], json.dumps(form, ensure_ascii=False)[1:-1]}
        # Half characters stand for bytes that are no text.
        forms.add(quote(form, safe="", errors="replace"))
    return forms


def _beside(name: str, value: str) -> re.Pattern[str]:
    """The value where it follows its variable's name, as in NAME=value, {'NAME': 'value'} and ('NAME', 'value')."""
    return re.compile(rf"""(\b{re.escape(name)}["']?\s*[=:,]\s*["']?){re.escape(value)}(?!\w)""")
