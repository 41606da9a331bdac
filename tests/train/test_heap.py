"""That the heap keeps what is freed, in processes of their own: the setting is for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mwm.train.heap import keep_freed_memory

FAULTS = """
import resource, sys, torch
from mwm.train.heap import keep_freed_memory
asked = keep_freed_memory() if sys.argv[1] == "keep" else True
torch.set_num_threads(1)
faults = []
for _ in range(8):  # the first ones have to find a block with room for the alignment
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(asked, min(faults))
"""


def _faults(how: str) -> tuple[str, int]:
    asked, faults = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout.split()
    return asked, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_a_freed_block_of_64_mib_is_found_again_without_page_faults() -> None:
    asked, kept = _faults("keep")
    if asked == "False":
        pytest.skip("another C library than glibc")
    assert kept < 200 < _faults("leave")[1]


def test_elsewhere_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        def mallopt(self, *_: int) -> int:
            raise AssertionError

    monkeypatch.setattr("ctypes.CDLL", lambda _: Musl())
    assert keep_freed_memory() is False
