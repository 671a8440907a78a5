"""A loader's helper process: `python -m videovae.data.worker FD` decodes what it is asked for over a socket.

It is a plain child with nothing of its parent's but that socket: no inherited locks, threads, group connections
or accelerator contexts, no second import of the training script, and no torch.
"""

import os
import select
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from videovae.data.clips import Clip, ClipDataset
from videovae.errors import DataError

Keys = list[tuple[int, int]]


def read_clips(dataset: ClipDataset, keys: Keys) -> list[Clip] | DataError:
    """The clips of these (epoch, index), or why there are none."""
    try:
        return [dataset[key] for key in keys]
    except DataError as error:
        return error
    except Exception as error:  # whatever it is, the training process has to hear of it
        return DataError(f"clips {keys} cannot be read ({type(error).__name__}: {error}).")


def serve(file_descriptor: int) -> None:
    """Answer requests until the parent closes its end, or dies."""
    threading.Thread(target=_exit_at_hangup, args=(file_descriptor,), daemon=True).start()
    with suppress(EOFError, ConnectionError), Connection(file_descriptor) as connection:
        dataset = connection.recv()
        while True:
            connection.send(read_clips(dataset, connection.recv()))


def _exit_at_hangup(file_descriptor: int) -> None:
    # A video may take long to decode, and nobody waits for it any more.
    hangup = select.poll()
    hangup.register(file_descriptor, 0)
    hangup.poll()
    os._exit(0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
