"""What is packed can be unpacked, as the page does it."""

import base64
import json
import zlib

import numpy as np

from rankwise.report.arrays import Packer, quantise


def test_packed_arrays_lie_where_their_references_say() -> None:
    packer = Packer()
    steps = packer.add(np.array([1, -2, 3], np.int32))
    bytes_ = packer.add(np.array([7, 8, 9], np.uint8))
    numbers = packer.add(np.array([[1.5, np.nan]], np.float32))
    whole = zlib.decompress(base64.b64decode(packer.pack({"name": "</script>", "steps": steps})))
    length = int.from_bytes(whole[:4], "little")
    assert json.loads(whole[4 : 4 + length]) == {"name": "</script>", "steps": steps}
    assert length % 4 == 0
    arrays = whole[4 + length :]
    assert np.frombuffer(arrays, "<i4", 3, steps["at"]).tolist() == [1, -2, 3]
    assert np.frombuffer(arrays, "u1", 3, bytes_["at"]).tolist() == [7, 8, 9]
    assert numbers["at"] % 4 == 0
    np.testing.assert_array_equal(np.frombuffer(arrays, "<f4", 2, numbers["at"]), [1.5, np.nan])


def test_durations_in_16_bits_are_right_to_two_in_ten_thousand() -> None:
    seconds = np.geomspace(2e-6, 9_000, 10_000)
    packed = quantise(seconds)
    back = 1e-6 * np.exp((packed.astype(float) - 1) / 65534 * np.log(1e10))
    assert np.abs(back / seconds - 1).max() < 2e-4


def test_what_is_no_duration_is_0_and_none_at_all_is_1() -> None:
    assert quantise(np.array([np.nan, np.inf, 0.0, -1.0, 1e9])).tolist() == [0, 0, 1, 1, 65535]


def test_numbers_beyond_16_bits_stay_finite() -> None:
    packer = Packer()
    reference = packer.add_short(np.array([1e9, -1e9, 3.0]))
    assert (reference["$"], reference["n"]) == ("f16", 3)
    whole = zlib.decompress(base64.b64decode(packer.pack({})))
    assert np.frombuffer(whole[-8:-2], "<f2").tolist() == [65504.0, -65504.0, 3.0]
