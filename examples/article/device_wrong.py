"""Device from the wrong rank: the second node asks for devices that it does not have.

device_wrong.py --devices-per-node 2

No accelerator is needed: `take_device` stands in for `torch.cuda.set_device`, which fails in this way and says
"invalid device ordinal".
"""

import argparse
import os


def take_device(index, num_devices):
    if index >= num_devices:
        raise RuntimeError(f"invalid device ordinal: device {index} of {num_devices}")
    print(f"rank {os.environ['RANK']} computes on device {index}\n", end="", flush=True)


parser = argparse.ArgumentParser()
parser.add_argument("--devices-per-node", type=int, required=True)
num_devices = parser.parse_args().devices_per_node

rank = int(os.environ["RANK"])
take_device(rank, num_devices)  # the fault: a rank counts all nodes, a device index only this one
