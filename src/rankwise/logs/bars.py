"""Progress bars of tqdm: drawn by the main process alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

_FILE_POSITION = 4
"""Of `file` among the arguments of a bar."""


class _Nowhere:
    """Takes what a bar draws, which goes on counting: one with `disable=True` lacks attributes that programs read."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def hide_tqdm() -> Callable[[], None]:
    """Let tqdm's bars that are begun from now on draw nothing on stderr and stdout; bars into files go on.

    Returns:
        Restores what was there before. Where others have put their own around ours, it stays inside and passes on.
    Ranks: local; on ranks other than the main process.
    """
    # torch imports it where it is installed; a program that imports it later without torch hides its bars itself.
    bars: Any = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    if bars is None:
        return lambda: None
    previous = bars.__init__
    is_restored = False

    @functools.wraps(previous)
    def begin(self: Any, *args: Any, **options: Any) -> None:
        file = options.get("file")
        if not is_restored and len(args) < _FILE_POSITION and (file is None or file in (sys.stderr, sys.stdout)):
            options["file"] = _Nowhere()
        previous(self, *args, **options)

    def restore() -> None:
        nonlocal is_restored
        is_restored = True
        if bars.__init__ is begin:
            bars.__init__ = previous

    bars.__init__ = begin
    return restore
