"""Device from the local rank: on every node the processes take devices 0, 1, ...

device_right.py --devices-per-node 2

On a machine with accelerators there is nothing to write: `session.device` is the answer, and it is current. Here the
number of devices is an argument, and the function that `init` asks is called with it.
"""

import argparse

import rankwise
from rankwise.device import device_index

parser = argparse.ArgumentParser()
parser.add_argument("--devices-per-node", type=int, required=True)
num_devices = parser.parse_args().devices_per_node

with rankwise.init() as session:
    index = device_index(session.identity, num_devices)
    lines = rankwise.gather_objects(f"rank {session.identity.rank} computes on device {index}")
    if session.identity.is_main_process:
        print("\n".join(lines), flush=True)
