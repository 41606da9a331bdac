"""That the heap keeps what is freed, in processes of their own: the setting is for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mwm.train.heap import keep_freed_memory

# Asks glibc itself: page faults also depend on huge pages and on what else the machine's memory is needed for.
HEAP = """
import ctypes, sys, torch
from mwm.train.heap import keep_freed_memory

class Mallinfo(ctypes.Structure):  # malloc.h: struct mallinfo; hblkhd is the 5th, fordblks the 9th of ten ints
    _fields_ = [(f"field{k}", ctypes.c_int) for k in range(10)]

try:
    ask = ctypes.CDLL(None).mallinfo
except AttributeError:
    print("no mallinfo"), sys.exit()
ask.restype = Mallinfo
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("not asked"), sys.exit()
torch.set_num_threads(1)
before = ask().field4
block = torch.ones(16 << 20)
mapped = ask().field4 - before
del block
print(mapped >> 20, ask().field8 >> 20)
"""


def _heap(how: str) -> tuple[int, int]:
    """MiB that a block of 64 MiB had mapped for itself, and MiB that the heap held free once the block was freed."""
    said = subprocess.run([sys.executable, "-c", HEAP, how], capture_output=True, text=True, check=True).stdout
    if said.startswith("no"):
        pytest.skip(f"another C library than glibc ({said.strip()})")
    mapped, free = map(int, said.split())
    return mapped, free


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_a_freed_block_of_64_mib_stays_in_the_heap() -> None:
    mapped, free = _heap("keep")
    assert mapped == 0 and free >= 64
    mapped, free = _heap("leave")
    assert mapped >= 64 > free


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def mallopt(self, *_: int) -> int:
            raise AssertionError

    monkeypatch.setattr("ctypes.CDLL", lambda _: Musl())
    assert keep_freed_memory() is False
