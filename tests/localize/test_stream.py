"""At the size of a data set: threads around the model, bounded memory, killed runs, shares of several processes, a SAM in between."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mwm.data import RegionCache, open_regions, read_list
from mwm.data.blob import read_array
from mwm.localize import RefineSettings, localize_folder
from mwm.localize.stream import Batches, Behind, read_ahead

SCRIPT = '''
import os, resource, sys, time
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from mwm.localize import localize_folder

torch.set_num_threads(1)


class Bright:
    name, fingerprint = "bright", "bright 1"

    def __init__(self, wait=0.0):
        self.wait = wait

    def __call__(self, images, prompts):
        time.sleep(self.wait)
        return images.mean(1)
'''


class Bright:
    """The image itself as its map; notes the size of each batch."""

    name, fingerprint = "bright", "bright 1"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.batches.append(len(images))
        return images.mean(1)


def write_scans(folder: Path, count: int, size: tuple[int, int] = (40, 60)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 100, size).astype(np.uint8)
        pixels[8:20, 10 + index % 30 : 25 + index % 30] = 220
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def python(code: str, *arguments: object, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT + code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order_and_errors_with_their_item(workers: int) -> None:
    def read(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        if item == 5:
            raise OSError("five")
        return item * item

    found = list(read_ahead(range(12), read, workers=workers, ahead=4))
    assert [item for item, _ in found] == list(range(12)) and [value for item, value in found if item != 5] == [i * i for i in range(12) if i != 5]
    assert isinstance(found[5][1], OSError)


def test_reading_never_runs_further_ahead_than_asked() -> None:
    lock, read, taken, most = threading.Lock(), [0], 0, 0

    def count(item: int) -> int:
        with lock:
            read[0] += 1
        return item

    for _ in read_ahead(range(60), count, workers=4, ahead=6):
        time.sleep(0.002)
        most = max(most, read[0] - taken)
        taken += 1
    assert read[0] == 60 and most <= 7


def test_batches_hold_one_kind_and_never_more_than_two_batches_in_all() -> None:
    batches: Batches[tuple[int, int]] = Batches(4)
    kinds, given, out = np.random.default_rng(0).integers(0, 7, 200).tolist(), 0, []
    for index, kind in enumerate(kinds):
        full = batches.add(kind, (kind, index))
        given += 1
        if full:
            out.append(full)
        assert given - sum(map(len, out)) < 8
    out += batches.rest()
    assert all(len({kind for kind, _ in batch}) == 1 and len(batch) <= 4 for batch in out)
    assert sorted(index for batch in out for _, index in batch) == list(range(200))


def test_work_behind_is_bounded_and_its_errors_reach_the_caller() -> None:
    running, most, done = [0], [0], []

    def work() -> int:
        most[0] = max(most[0], running[0])
        time.sleep(0.001)
        running[0] -= 1
        return 1

    with Behind(done.append, workers=1, most=3) as behind:
        for _ in range(20):
            running[0] += 1
            behind.submit(work)
    assert len(done) == 20 and most[0] <= 5
    with pytest.raises(ZeroDivisionError), Behind(done.append) as behind:
        behind.submit(lambda: 1 // 0)


@pytest.mark.parametrize("workers", [0, 3])
def test_regions_do_not_depend_on_threads_and_batches_are_filled(tmp_path: Path, workers: int) -> None:
    scans = write_scans(tmp_path / "scans", 10)
    write_scans(tmp_path / "scans" / "other", 7, (48, 60))
    localizer = Bright()
    report = localize_folder(scans, "x", localizer, tmp_path / "regions", batch_size=4, workers=workers, progress=False)
    assert report.images == report.made == 17 and sorted(localizer.batches) == [2, 3, 4, 4, 4]
    regions = open_regions(tmp_path / "regions")
    for record in read_list(scans):
        assert np.array_equal(regions.region(record).numpy() > 0, np.asarray(Image.open(record.path)) > 127)


def test_killed_run_leaves_whole_regions_only_and_the_next_makes_the_rest(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "scans", 40), tmp_path / "regions"
    process = python("localize_folder(sys.argv[1], 'x', Bright(0.05), sys.argv[2], batch_size=2, progress=False)", scans, out)
    until = time.monotonic() + 60
    while len(list(out.rglob("*.region"))) < 8 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stored = list(out.rglob("*.region"))
    assert 8 <= len(stored) < 40 and not (out / "regions.json").exists()
    for path in stored:
        assert read_array(path).shape == (40, 60)
    report = localize_folder(scans, "x", Bright(), out, progress=False)
    assert report.images == 40 and report.made == 40 - len(stored)


def test_peak_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Held back, the maps or images of the longer run would take 110 MiB more."""
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, count in ((few, 8), (many, 64)):
        folder.mkdir()
        for index in range(count):
            pixels = np.full((700, 700), index, dtype=np.uint8)
            pixels[100:200, 100 + index : 300 + index] = 255
            Image.fromarray(pixels).save(folder / f"{index}.png")
    code = '''
for scans, out in ((sys.argv[1], sys.argv[3]), (sys.argv[2], sys.argv[4])):
    report = localize_folder(scans, "x", Bright(), out, batch_size=2, workers=2, progress=False)
    print(report.made, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
'''
    out, error = python(code, few, many, tmp_path / "a", tmp_path / "b").communicate()
    assert len(out.splitlines()) == 2, error
    (small, before), (large, after) = (map(int, line.split()) for line in out.splitlines())
    assert (small, large) == (8, 64) and after - before < 50 * 1024


def test_processes_share_the_images_and_write_one_index(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "scans", 9), tmp_path / "regions"
    (scans / "broken.png").write_bytes((scans / "0.png").read_bytes()[:90])
    localize_folder(scans, "x", Bright(), tmp_path / "alone", progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "localizer = Bright()\nreport = localize_folder(sys.argv[1], 'x', localizer, sys.argv[2], progress=False)\nprint(report.images, report.made, report.skipped)"
    started = [python(code, scans, out, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(2)]
    for process in started:
        said, error = process.communicate(timeout=120)
        assert said.split() == ["9", "9", "1"], error
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == ["regions.json", "report.json", "skipped.csv"]
    assert json.loads((out / "report.json").read_text())["entropy"]["values"] == 9
    one, both = RegionCache(tmp_path / "alone"), RegionCache(out)
    assert one.meta == both.meta and len(both) == 9
    assert all(torch.equal(one.region(record), both.region(record)) for record in read_list(scans) if record.name != "broken.png")
    assert (out / "skipped.csv").read_text() == (tmp_path / "alone" / "skipped.csv").read_text()


def test_half_written_files_of_killed_runs_are_swept_but_not_those_in_the_making(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, young = tmp_path / "ab" / ".x.region.1.aa.tmp", tmp_path / "ab" / ".y.region.2.bb.tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    RegionCache(tmp_path).sweep()
    assert not old.exists() and young.exists()


def test_parts_of_a_killed_run_are_replaced_and_those_of_another_number_of_processes_ignored(tmp_path: Path) -> None:
    key = RegionCache.key("one")
    for part, record_id in (((0, 2), 1), ((1, 2), 2), ((2, 3), 3)):
        cache = RegionCache(tmp_path)
        cache.meta = {"prompt": "x"}
        cache.put(key, torch.ones(4, 4))
        cache.assign(record_id, key)
        cache.save(part=part)
    assert not (tmp_path / "regions.json").exists()
    RegionCache(tmp_path).merge(2)
    merged = RegionCache(tmp_path)
    assert merged.region(1) is not None and merged.region(2) is not None and merged.region(3) is None and merged.meta == {"prompt": "x"}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["regions.json"]


def test_folder_of_the_first_version_stays_readable(tmp_path: Path) -> None:
    """Bytes as version 0.1 wrote them: 8-bit values, deflated, one file each."""
    key = "00112233445566778899aabbccddeeff"
    (tmp_path / "00").mkdir()
    stored = "4d574d31010102000200000003000000cb884922986e159295d18a47f6701734785e63f8ffbf818111000a7e0280"
    (tmp_path / "00" / f"{key[2:]}.region").write_bytes(bytes.fromhex(stored))
    (tmp_path / "regions.json").write_text(json.dumps({"format": "mwm regions 1", "meta": {"prompt": "lungs"}, "regions": {"0000002a": key}}))
    region = RegionCache(tmp_path).region(42)
    assert (region * 255).round().tolist() == [[0, 255, 255], [128, 0, 1]]


class Sam:
    """Draws each region two columns wider, and notes what it was given."""

    fingerprint, kept = "sam 1", 0

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, images: Tensor, regions: Tensor) -> Tensor:
        self.given.append(regions.clone())
        self.kept += 1
        return torch.nn.functional.max_pool2d(regions[:, None], (1, 5), 1, (0, 2))[:, 0]


def test_sam_draws_between_the_parts_and_their_boxes(tmp_path: Path) -> None:
    scans, sam = write_scans(tmp_path / "scans", 1), Sam()
    report = localize_folder(scans, "x", Bright(), tmp_path / "regions", RefineSettings(expand=1.5), sam=sam, progress=False)
    region = open_regions(tmp_path / "regions").region(next(iter(read_list(scans))))
    assert float(sam.given[0].sum()) == 12 * 15  # the part alone, before its box is expanded
    assert float(region.sum()) == 18 * 29 or float(region.sum()) == 18 * 28  # the box of 12 x 19 that the drawing has, times 1.5
    assert report.kept == 1 and "1 parts kept" in str(report)
    again = localize_folder(scans, "x", Bright(), tmp_path / "regions", RefineSettings(expand=1.5), sam=Sam(), progress=False)
    without = localize_folder(scans, "x", Bright(), tmp_path / "regions", RefineSettings(expand=1.5), progress=False)
    assert again.made == 0 and without.made == 1


def test_workers_must_be_a_number_of_threads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be at least 0"):
        localize_folder(write_scans(tmp_path / "scans", 1), "x", Bright(), tmp_path / "regions", workers=-1, progress=False)
