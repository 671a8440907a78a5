"""The main process raises while the others wait for it; every rank prints when it learned of that, and what."""

import json
import time

import rankwise


def prepare() -> None:
    raise ZeroDivisionError("the data set has no clips")


with rankwise.init(device_type="cpu", timeout_seconds=120) as session:
    try:
        with rankwise.main_process_first():
            if session.identity.is_main_process:
                time.sleep(1)  # the others wait by now
            prepare()
    except BaseException as error:
        told = {"rank": session.identity.rank, "at": time.monotonic(), "type": type(error).__name__}
        print(json.dumps(told | {"message": str(error)}), flush=True)
        raise
