"""Objects behind a URL of fsspec, by name; what fails on the way there is tried again for a while."""

from __future__ import annotations

import contextlib
import errno
import random
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from rankwise import logs
from rankwise.errors import CheckpointError

T = TypeVar("T")

GIVE_UP_SECONDS = 120.0
"""For how long after its first failure a call is tried again."""
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
CALL_SECONDS = 30.0
"""How long one call may take, besides the time for its bytes."""
SLOWEST_BYTES_PER_SECOND = 1 << 20

_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
    ImportError,
)
_FINAL_ERRORS = (errno.EINVAL, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_FINAL_NAMES = re.compile(r"Credential|ParamValidation|Profile|NoRegion")
# Signed URLs carry what opens the store, and errors quote them.
_SIGNATURE = re.compile(r"([?&][^=&\s]*(?:sig|token|key|secret|credential)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
_logger = logs.get_logger(__name__)


class Objects:
    """What lies below a URL.

    Args:
        url: anything that fsspec opens: s3://bucket/folder, gs://..., memory://folder. Keys and servers come from where
            fsspec and its packages look for them: their variables and files.
    Attributes:
        location: the URL for a person, without passwords.
    Raises:
        CheckpointError: fsspec, or the package for this kind of URL, is not installed; or the URL makes no sense.
    Ranks: local.
    """

    def __init__(self, url: str) -> None:
        self.location = clean(url).rstrip("/")
        try:
            import fsspec  # type: ignore[import-untyped]

            self._files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise CheckpointError(
                f"{self.location} cannot be opened: {clean(str(error))}. Install rankwise[remote], which is enough for "
                "s3://, and for other URLs their package besides."
            ) from error
        except Exception as error:
            raise CheckpointError(f"{self.location} cannot be opened: {_say(error)}. Give a URL of fsspec.") from None
        self._root = str(root).rstrip("/")

    def names(self) -> list[str]:
        """The names directly below the URL; none where there is nothing.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """

        def call(**limit: float) -> list[str]:
            try:
                entries: list[str] = self._files.ls(self._root, detail=False, **limit)
            except FileNotFoundError:
                return []
            return [entry.rstrip("/").rpartition("/")[2] for entry in entries]

        return self._call("list the objects", call)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Every object below the URL whose name begins so, with its size in bytes.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """

        def call(**limit: float) -> dict[str, int]:
            try:
                # Where objects have no folders, the prefix saves a call per folder; others ignore it.
                found = self._files.find(self._root, prefix=prefix, detail=True, **limit)
            except FileNotFoundError:
                return {}
            names = ((path.removeprefix(self._root).lstrip("/"), info) for path, info in found.items())
            return {name: int(info["size"]) for name, info in names if name.startswith(prefix)}

        return self._call("list the objects", call)

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        path = self._path(name)
        return self._call(
            f"read {name}", lambda **limit: bytes(self._files.cat_file(path, **limit)), may_be_missing=True
        )

    def write(self, name: str, content: bytes, give_up_seconds: float | None = None) -> None:
        """Put an object, in place of one that is there.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        self._make_parent(name)
        path = self._path(name)
        self._call(
            f"write {name}",
            lambda **limit: self._files.pipe_file(path, content, **limit),
            len(content),
            give_up_seconds,
        )

    def create(self, name: str, content: bytes) -> bool:
        """Put an object where there is none; False where there is one.

        Of several that do it at once one alone succeeds where the store can tell (S3, Google Cloud Storage).

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        self._make_parent(name)
        path = self._path(name)

        def call(**limit: float) -> bool:
            try:
                self._files.pipe_file(path, content, mode="create", **limit)
            except FileExistsError:
                # An answer may have been lost, and what is there be ours.
                return bytes(self._files.cat_file(path, **limit)) == content
            return True

        return self._call(f"create {name}", call)

    def upload(self, local: Path, name: str) -> None:
        """Put a local file.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        self._make_parent(name)
        path = self._path(name)
        self._call(
            f"write {name}",
            lambda **limit: self._files.put_file(str(local), path, **limit),
            local.stat().st_size,
        )

    def download(self, name: str, local: Path, num_bytes: int) -> None:
        """Get an object as a local file.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        path = self._path(name)
        self._call(
            f"read {name}",
            lambda **limit: self._files.get_file(path, str(local), **limit),
            num_bytes,
            may_be_missing=True,
        )

    def remove(self, names: Iterable[str], give_up_seconds: float | None = None) -> None:
        """Delete objects; those that are gone already are none to tell of.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        for name in names:
            path = self._path(name)

            def call(path: str = path, **limit: float) -> None:
                self._files.rm_file(path, **limit)

            with contextlib.suppress(FileNotFoundError):
                self._call(f"delete {name}", call, 0, give_up_seconds, may_be_missing=True)

    def remove_below(self, folder: str, give_up_seconds: float | None = None) -> None:
        """Delete all that lies below a name.

        Raises:
            CheckpointError: the store does not answer, or refuses.
        Ranks: local.
        """
        path = self._path(folder)

        def call(**limit: float) -> None:
            try:
                self._files.rm(path, recursive=True, **limit)
            except FileNotFoundError:
                return

        self._call(f"delete {folder}", call, 0, give_up_seconds)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        """Where there are folders, the one that the object goes to; an object store has none to make."""
        if not self._has_limits():
            parent = self._path(name).rpartition("/")[0]
            self._call("make a folder", lambda **limit: self._files.makedirs(parent, exist_ok=True, **limit))

    def _has_limits(self) -> bool:
        return bool(getattr(self._files, "async_impl", False))

    def _call(
        self,
        what: str,
        call: Callable[..., T],
        num_bytes: int = 0,
        give_up_seconds: float | None = None,
        *,
        may_be_missing: bool = False,
    ) -> T:
        """Call, and again after pauses that grow, where the store or the way to it failed."""
        # The packages' own limits, taken together, are hours.
        seconds = CALL_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND
        limit: dict[str, Any] = {"timeout": seconds} if self._has_limits() else {}
        give_up = GIVE_UP_SECONDS if give_up_seconds is None else give_up_seconds
        begin, pause, num_calls = 0.0, FIRST_PAUSE_SECONDS, 0
        while True:
            num_calls += 1
            try:
                return call(**limit)
            except Exception as error:
                if may_be_missing and isinstance(error, FileNotFoundError):
                    raise
                failure = error
            now = time.monotonic()
            begin = begin or now
            cause = _say(failure) if not isinstance(failure, TimeoutError) else f"no answer within {seconds:.0f} s"
            if _is_final(failure) or now - begin + pause > give_up:
                times = "" if num_calls == 1 else f", tried {num_calls} times in {now - begin:.0f} s"
                told = CheckpointError(f"cannot {what} in {self.location}{times}: {cause}")
                # The cause is shown where it holds nothing that must be hidden.
                raise told from (failure if clean(str(failure)) == str(failure) else None)
            if num_calls == 1:
                _logger.warning("cannot %s in %s, trying again: %s", what, self.location, cause)
            time.sleep(pause * random.uniform(0.75, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def clean(text: str) -> str:
    """A text without passwords, keys and signatures.

    Ranks: local.
    """
    return _SIGNATURE.sub(r"\1***", logs.redact(text))


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_ERRORS:
        return True
    return any(_FINAL_NAMES.search(kind.__name__) for kind in type(error).__mro__)


def _say(error: Exception) -> str:
    text = " ".join(clean(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
