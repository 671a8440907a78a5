"""Every rank enters a session and tells who it is; the main process prints what all told, a line of JSON for each.

usage: gather.py [TIMEOUT_SECONDS]. A rank that fails prints how long that took, and the error.
"""

import json
import sys
import time
from dataclasses import asdict

import rankwise

init = rankwise.init  # imports torch, which is no part of the time
timeout_seconds = float(sys.argv[1]) if sys.argv[1:] else 60.0
started = time.monotonic()
try:
    with init(device_type="cpu", timeout_seconds=timeout_seconds) as session:
        identity = session.identity
        mine = asdict(identity) | {
            "sources": dict(identity.sources),
            "is_main_process": identity.is_main_process,
            "is_local_main_process": identity.is_local_main_process,
            "device": str(session.device),
        }
        rows = rankwise.gather_objects(mine)
        rankwise.barrier("told")
        if identity.is_main_process:
            print("\n".join(map(json.dumps, rows)))
except rankwise.RankwiseError as error:
    print(json.dumps({"seconds": time.monotonic() - started, "error": str(error)}), flush=True)
    raise
