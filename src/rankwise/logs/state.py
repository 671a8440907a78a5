"""What the parts of the logs have in common in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Send = Callable[[dict[str, Any]], bool]

rank: int | None = None
"""The session's rank, None outside of a session."""
step: int | None = None
"""The step that records carry."""
send: Send | None = None
"""How records travel to the main process; None where they cannot."""
is_worker: bool = False
"""Whether this process was forked or spawned by a rank, and is none itself."""
