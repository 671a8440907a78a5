"""A terminal for one program: its own screen, keys one by one, and everything as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import termios
import tty
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from rich.color import ColorSystem
from rich.style import Style

from rankwise.top.frame import Line

_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"
"""Around a frame: terminals that know it show nothing of a frame before it is whole."""

_KEYS = {
    "\x1b[A": "up",
    "\x1b[B": "down",
    "\x1b[C": "right",
    "\x1b[D": "left",
    "\x1bOA": "up",
    "\x1bOB": "down",
    "\x1bOC": "right",
    "\x1bOD": "left",
    "\x1b[5~": "pgup",
    "\x1b[6~": "pgdn",
    "\x1b[H": "home",
    "\x1b[F": "end",
    "\x1b[1~": "home",
    "\x1b[4~": "end",
    "\x1bOH": "home",
    "\x1bOF": "end",
    "\r": "enter",
    "\n": "enter",
    "\x7f": "backspace",
    "\x08": "backspace",
    "\x15": "clear",
    "\x1b": "escape",
}
# A sequence of a key, known or not, whole; an escape alone; any other character.
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO[@-~]|\x1b|.", re.DOTALL)
_ESCAPE_SECONDS = 0.05


def parse_keys(text: str) -> list[str]:
    """The names of the keys that a terminal has sent; unknown ones are left out.

    Ranks: local.
    """
    keys = []
    for found in _KEY.findall(text):
        if found in _KEYS:
            keys.append(_KEYS[found])
        elif len(found) == 1 and found.isprintable():
            keys.append(found)
    return keys


def color_system(environ: Any = os.environ) -> ColorSystem | None:
    """Which colours the terminal has; None with NO_COLOR.

    Ranks: local.
    """
    if environ.get("NO_COLOR"):
        return None
    term, more = environ.get("TERM", ""), environ.get("COLORTERM", "").lower()
    if more in ("truecolor", "24bit"):
        return ColorSystem.TRUECOLOR
    return ColorSystem.EIGHT_BIT if "256" in term or "direct" in term else ColorSystem.STANDARD


class Painter:
    """Lines as text with the codes of a terminal."""

    def __init__(self, colors: ColorSystem | None) -> None:
        self._colors = colors
        self._styles: dict[str, Style] = {}

    def paint(self, line: Line) -> str:
        """The line, with its colours where there are some, and else bold and reverse at least."""
        return "".join(self._piece(text, style) for text, style in line)

    def _piece(self, text: str, style: str) -> str:
        if not style or not text:
            return text
        if style not in self._styles:
            parsed = Style.parse(style)
            self._styles[style] = parsed if self._colors is not None else parsed.without_color
        # With no colours rich writes no codes at all: bold is none of them.
        return self._styles[style].render(text, color_system=self._colors or ColorSystem.STANDARD)


class Terminal:
    """The terminal of stdin and stdout while a `with` block runs.

    Ctrl-C raises KeyboardInterrupt, SIGTERM SystemExit; Ctrl-Z stops the program with the terminal as it was.

    Ranks: local; main thread.
    """

    def __init__(self, stdin: int = 0, stdout: int = 1) -> None:
        self._in, self._out = stdin, stdout
        self._painter = Painter(color_system())
        self._before: list[Any] = []
        self._shown: list[str] = []
        self._size: os.terminal_size | None = None
        self._wake_read, self._wake_write = -1, -1
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        handlers = {signal.SIGWINCH: self._resized, signal.SIGTSTP: self._stopped, signal.SIGTERM: _terminated}
        self._before = termios.tcgetattr(self._in)
        for number, handler in handlers.items():
            self._handlers[number] = signal.signal(number, handler)
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            self._give_back()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def wake(self) -> None:
        """Let `keys` return; any thread may call it."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def keys(self, timeout_seconds: float) -> list[str]:
        """The keys that were pressed; none where it was woken up, or nothing came in time.

        Raises:
            EOFError: the terminal is gone.
        """
        ready, _, _ = select.select([self._in, self._wake_read], [], [], timeout_seconds)
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if self._in not in ready:
            return []
        try:
            content = os.read(self._in, 4096)
        except OSError as error:
            raise EOFError from error
        if not content:
            raise EOFError
        # An arrow's sequence may come in two pieces.
        if content.endswith((b"\x1b", b"\x1b[", b"\x1bO")) and select.select([self._in], [], [], _ESCAPE_SECONDS)[0]:
            content += os.read(self._in, 4096)
        return parse_keys(content.decode("utf-8", "replace"))

    def size(self) -> os.terminal_size:
        """Columns and lines now."""
        try:
            found = os.get_terminal_size(self._out)
        except OSError:
            found = shutil.get_terminal_size()
        return found if found.columns and found.lines else os.terminal_size((80, 24))

    def draw(self, lines: Sequence[Line]) -> None:
        """Show the lines; only those that have changed are sent."""
        size = self.size()
        is_new = size != self._size
        painted = [self._painter.paint(line) for line in lines]
        known = [] if is_new else self._shown
        changed = [
            f"\x1b[{number + 1};1H{text}\x1b[0m\x1b[K"
            for number, text in enumerate(painted)
            if number >= len(known) or known[number] != text
        ]
        self._shown, self._size = painted, size
        if changed:
            self._write(BEGIN + ("\x1b[2J" if is_new else "") + "".join(changed) + END)

    def _write(self, text: str) -> None:
        content = text.encode("utf-8", "replace")
        while content:
            content = content[os.write(self._out, content) :]

    def _take(self) -> None:
        tty.setcbreak(self._in)
        self._size = None
        self._write(_ENTER)

    def _give_back(self) -> None:
        termios.tcsetattr(self._in, termios.TCSADRAIN, self._before)
        self._write(_LEAVE)

    def _resized(self, number: int, frame: FrameType | None) -> None:
        self.wake()

    def _stopped(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here it goes on, once someone has said so.
        signal.signal(signal.SIGTSTP, self._stopped)
        self._take()
        self.wake()


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
