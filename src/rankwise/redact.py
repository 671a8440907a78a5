"""Values that nobody else may read, taken out of text before it is written."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

MIN_LENGTH = 8
"""Shorter values are left: "true" or "1234" stands in many lines that say nothing about a secret."""

REFRESH_SECONDS = 1.0

_HIDDEN = "***"
# TOKENIZERS_PARALLELISM, KEYBOARD and GIT_AUTHOR_NAME hold no secrets.
_SECRET_NAME = re.compile(r"token(?!iz)|key(?!board)|secret|passw|passphrase|credential|auth(?!or(?!i))", re.IGNORECASE)
_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")
_ADDRESS_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with `***` for the value of every variable whose name speaks of a secret, and for passwords in URLs.

    A name does that with token, key, secret, passw(or)d, passphrase, credential or auth in it. Values of fewer than 8
    characters are left.

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
    secrets = sorted(_secrets(environ), key=len, reverse=True)

    def clean(text: str) -> str:
        for secret in secrets:
            if secret in text:
                text = text.replace(secret, _HIDDEN)
        return _ADDRESS_PASSWORD.sub(_HIDDEN, text) if "://" in text and "@" in text else text

    return clean


def _secrets(environ: Mapping[str, str]) -> Iterable[str]:
    # A file's last newline in a variable, and a value shown with repr, are the same secret in other letters.
    values = [value for name, value in environ.items() if _SECRET_NAME.search(name)]
    forms = {form for value in values for form in (value, value.strip(), repr(value)[1:-1], repr(value.strip())[1:-1])}
    return {form for form in forms if len(form.strip()) >= MIN_LENGTH}
