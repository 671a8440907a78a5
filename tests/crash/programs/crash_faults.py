"""Faults at the n-th file-system call of the checkpoint code, and what a loss of power would leave of it.

The calls are those that Python makes through `os`, `open` and files opened for writing, below one folder.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import stat
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.checkpoint import lease

CHANGES = {"create", "write", "sync", "rename", "link", "unlink", "mkdir", "rmdir"}
"""Calls after which the disk may hold something else than before."""

_NAMES = {
    **{name: name for name in ("link", "unlink", "mkdir", "rmdir", "listdir", "scandir", "stat")},
    "rename": "rename",
    "replace": "rename",
    "fsync": "sync",
    "fdatasync": "sync",
    "pwrite": "write",
}


class Watch:
    """Sees every call of this process below `root`.

    Args:
        shadow: where to keep what a loss of power could not take; nothing is kept without.
    """

    def __init__(self, root: Path, shadow: Path | None = None) -> None:
        self._root = str(root.resolve())
        self._shadow = None if shadow is None else Shadow(shadow)
        self._inside = threading.local()
        self._counted: set[str] | None = None
        self._index = -1
        self._fault = ""
        self._seconds = 0.0
        self.calls: list[tuple[str, str, str]] = []
        """Kind, place in the code and path of each call since `arm`."""
        self.fired: tuple[str, str, str] | None = None
        self.tell: Callable[[tuple[str, str, str]], object] = lambda call: None
        """Called with the call at which the fault comes, before it does."""
        self._patch()

    def arm(self, counted: set[str] | None, index: int, fault: str, seconds: float = 0.0) -> None:
        """Count calls from here on.

        Args:
            counted: kinds of calls; None means all.
            index: the call at which the fault comes; -1 for none.
            fault: "kill" before the call, "torn" amid a write, "slow" for a sleep, or the name of an errno.
        """
        self._counted, self._index, self._fault, self._seconds = counted, index, fault, seconds
        self.calls, self.fired = [], None

    def disarm(self) -> None:
        """Count no more."""
        self._fault = ""

    def _patch(self) -> None:
        for name, kind in _NAMES.items():
            setattr(os, name, self._watched(kind, getattr(os, name)))
        os.remove = os.unlink
        lease._sync = os.fdatasync
        real_open = os.open

        def open_descriptor(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            kind = "create" if flags & os.O_CREAT else "open"
            return self._watched(kind, real_open)(path, flags, *rest, **named)

        os.open = open_descriptor
        os.write = self._watched("write", os.write)
        real_file = io.open

        def open_file(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
            if self._path(file, None) is None:
                return real_file(file, mode, buffering, *rest, **named)
            if "b" not in mode or not set(mode) & set("wxa"):
                return self._watched("open", real_file)(file, mode, buffering, *rest, **named)
            raw = self._watched("create", _WatchedFile)(file, mode.replace("b", ""))
            raw.watched_write = self._watched("write", raw.plain_write, path=os.fspath(file))
            return raw if buffering == 0 else io.BufferedWriter(raw)

        io.open = builtins.open = open_file

    def _watched(self, kind: str, call: Callable[..., Any], path: str | None = None) -> Callable[..., Any]:
        def watched(*args: Any, **named: Any) -> Any:
            if getattr(self._inside, "busy", False):
                return call(*args, **named)
            self._inside.busy = True
            try:
                place = path or self._path(args[0] if args else ".", named.get("dir_fd") or named.get("src_dir_fd"))
                if place is None:
                    return call(*args, **named)
                self._count(kind, place, call, args)
                result = call(*args, **named)
                if self._shadow is not None:
                    self._shadow.note(kind, place, args)
                return result
            finally:
                self._inside.busy = False

        return watched

    def _count(self, kind: str, path: str, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self._fault or (self._counted is not None and kind not in self._counted):
            return
        self.calls.append((kind, _place_in_code(), os.path.relpath(path, self._root)))
        if self._fault == "slow" and kind == "sync":
            threading.Event().wait(self._seconds)
        if len(self.calls) - 1 != self._index:
            return
        self.fired = self.calls[-1]
        self.tell(self.fired)
        if self._fault in ("kill", "torn"):
            if self._fault == "torn":
                # Of os.write(descriptor, content), os.pwrite(descriptor, content, offset), or a file's write(content).
                place = 0 if len(args) == 1 else 1
                content = memoryview(args[place]).cast("B")
                call(*args[:place], content[: len(content) // 2], *args[place + 1 :])
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self._fault, None)
        if number is not None:
            raise OSError(number, os.strerror(number), path)

    def _path(self, place: Any, folder: int | None) -> str | None:
        """The path that a call is about, where it is below the root."""
        try:
            if isinstance(place, int):
                path = os.readlink(f"/proc/self/fd/{place}")
            else:
                path = os.fsdecode(place)
                start = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
                path = os.path.normpath(os.path.join(start, path))
        except (OSError, TypeError):
            return None
        return path if path == self._root or path.startswith(self._root + "/") else None


class _WatchedFile(io.FileIO):
    watched_write: Callable[..., int]

    def plain_write(self, content: Any) -> int:
        return super().write(content) or 0

    def write(self, content: Any) -> int:
        return self.watched_write(content)


class Shadow:
    """What would be left after a loss of power: contents and names as they were when they were last synced.

    Ranks share it. Inodes are used again after a removal, so each file has an identity of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def note(self, kind: str, path: str, args: tuple[Any, ...]) -> None:
        if kind in ("create", "mkdir"):
            (self._folder / f"inode-{os.stat(path).st_ino}").write_text(uuid.uuid4().hex)
        elif kind == "sync":
            status = os.fstat(args[0])
            name = self.identity(status.st_ino)
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(path) as entries:
                    names = {entry.name: self.identity(entry.inode()) for entry in entries}
                (self._folder / f"names-{name}").write_text(json.dumps(names))
            else:
                (self._folder / f"content-{name}").write_bytes(Path(path).read_bytes())

    def identity(self, inode: int) -> str:
        path = self._folder / f"inode-{inode}"
        return path.read_text() if path.exists() else f"old-{inode}"

    def image(self, root: Path, target: Path, *, names: tuple[str, str]) -> None:
        """Build what may be left of `root`: synced contents, under some of the names.

        Args:
            names: of the folder itself, and of those in it: "synced" ones alone, all "current" ones, or, as changes
                that are not synced yet reach the disk in any order, those that are "both".
        """
        self._fill(target, self.identity(os.stat(root).st_ino), root, names)

    def _fill(self, target: Path, identity: str, source: Path | None, names: tuple[str, str]) -> None:
        target.mkdir()
        listed = self._folder / f"names-{identity}"
        synced = json.loads(listed.read_text()) if listed.exists() else {}
        current = {}
        if source is not None:
            current = {entry.name: self.identity(entry.inode()) for entry in os.scandir(source)}
        both = {name: other for name, other in synced.items() if current.get(name) == other}
        for name, other in {"synced": synced, "current": current, "both": both}[names[0]].items():
            inner = source / name if source is not None and current.get(name) == other else None
            # What the test itself has put there bears the identity of what had its inode before.
            is_folder = inner.is_dir() if inner is not None else (self._folder / f"names-{other}").exists()
            if is_folder:
                self._fill(target / name, other, inner, (names[1], names[1]))
            else:
                content = self._folder / f"content-{other}"
                (target / name).write_bytes(content.read_bytes() if content.exists() else b"")


def _place_in_code() -> str:
    """The innermost frame that is rankwise's: file, line and function."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if "rankwise" in path.parts and path.name != Path(__file__).name:
            return f"{path.name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"
