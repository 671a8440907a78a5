"""One rank is lost while the others wait for it in a barrier; each of them prints how long it waited, and the error.

usage: lose_a_rank.py RANK [asleep]. The rank kills itself; asleep, it says "asleep" and never comes.
"""

import json
import os
import signal
import sys
import time

import rankwise

with rankwise.init(device_type="cpu", timeout_seconds=120) as session:
    rank = session.identity.rank
    rankwise.barrier("all are here")
    if rank == int(sys.argv[1]):
        if "asleep" in sys.argv:
            print("asleep", flush=True)
            time.sleep(600)
        time.sleep(1)  # the others are in the barrier by now
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        rankwise.barrier("one is missing")
    except rankwise.RankwiseError as error:
        told = {"rank": rank, "seconds": time.monotonic() - started, "error": str(error)}
        print(json.dumps(told), flush=True)
        raise
