"""Regions on disk and masks of a user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import ramp

from mwm.data import DataError, MaskFolder, RegionCache, open_regions, read_list, read_mask
from mwm.data.blob import CorruptEntry, read_array, write_array

REGION = torch.linspace(0, 1, 60).reshape(6, 10)


def test_regions_come_back_in_the_precision_that_coverage_counts_in(tmp_path: Path) -> None:
    cache = RegionCache(tmp_path)
    key = cache.key("image", "prompt", "settings")
    assert key not in cache
    cache.put(key, REGION)
    assert key in cache and torch.equal(cache.get(key), (REGION * 255).round() / 255)


def test_keys_tell_parts_apart() -> None:
    keys = [RegionCache.key("ab", "c"), RegionCache.key("a", "bc"), RegionCache.key("abc"), RegionCache.key("abc", ""), RegionCache.key(b"ab", "d")]
    assert len(set(keys)) == 5 and RegionCache.key("ab") == RegionCache.key(b"ab")


def test_assignments_and_meta_survive_and_merge(tmp_path: Path) -> None:
    one = RegionCache(tmp_path)
    one.put(one.key("a"), REGION)
    one.assign(7, one.key("a"))
    one.meta["prompt"] = "lungs"
    one.save()
    two = RegionCache(tmp_path)
    assert two.meta == {"prompt": "lungs"} and torch.equal(two.region(7), one.get(one.key("a"))) and two.region(8) is None
    two.assign(8, two.key("a"))
    two.save()
    assert len(RegionCache(tmp_path)) == 2
    three = RegionCache(tmp_path)
    three.meta["prompt"] = "brain"
    three.assign(9, three.key("a"))
    three.save()
    assert len(RegionCache(tmp_path)) == 1, "regions of another prompt do not stay behind"


def test_two_processes_that_fill_one_folder_keep_each_others_assignments(tmp_path: Path) -> None:
    """Both open the folder before either writes its index; the second had thrown the images of the first away."""
    one, two = RegionCache(tmp_path), RegionCache(tmp_path)
    for number, cache in enumerate((one, two)):
        cache.put(key := cache.key(str(number)), REGION)
        cache.assign(number, key)
        cache.meta["prompt"] = "lungs"
    one.save()
    two.save()
    assert len(RegionCache(tmp_path)) == 2
    one.assign(5, one.key("0"))
    one.save()
    assert len(RegionCache(tmp_path)) == 3
    other = RegionCache(tmp_path)
    other.meta["prompt"] = "brain"
    other.assign(9, other.key("0"))
    other.save()
    assert len(RegionCache(tmp_path)) == 1


@pytest.mark.parametrize("change", [
    {"regions": {"0000000a": "../../../../../etc/passwd"}}, {"regions": {"0000000a": 5}}, {"regions": [1, 2]}, {"regions": {"../x": "0" * 32}}, {"meta": "abc"}, {"meta": [1]},
    {"regions": {"0000000a": "/" + "0" * 31}},
])
def test_an_index_that_points_elsewhere_or_is_none_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    RegionCache(tmp_path).save()
    stored = json.loads((tmp_path / "regions.json").read_text())
    (tmp_path / "regions.json").write_text(json.dumps(stored | change))
    with pytest.raises(DataError, match=r"regions\.json in .* is damaged"):
        open_regions(tmp_path)


def test_an_index_of_a_hundred_thousand_brackets_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "regions.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is damaged"):
        open_regions(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "NaN", "stack"])
def test_a_region_file_that_is_none_is_missing_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    cache = RegionCache(tmp_path)
    cache.put(key := cache.key("a"), REGION)
    (path,) = tmp_path.rglob("*.region")
    if kind == "huge":
        with path.open("r+b") as file:
            file.truncate(20 * 2**30)
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "NaN":
        write_array(path, np.full((4, 4), np.nan, np.float32), packed=True)
    elif kind == "stack":
        write_array(path, np.zeros((2, 4, 4), np.uint8), packed=True)

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        assert key not in cache
        with pytest.raises(KeyError):
            cache.get(key)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "header"])
def test_a_damaged_region_is_made_again_not_used(tmp_path: Path, damage: str) -> None:
    cache = RegionCache(tmp_path)
    cache.put(key := cache.key("a"), REGION)
    cache.assign(1, key)
    (path,) = tmp_path.rglob("*.region")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-2] ^= 4
    if damage == "header":
        data[8:16] = b"\xff" * 8
    path.write_bytes({"cut": bytes(data[:-5]), "empty": b""}.get(damage, bytes(data)))
    assert key not in cache
    with pytest.raises(KeyError):
        cache.get(key)
    with pytest.raises(DataError, match="Run the same mwm localize again"):
        cache.region(1)
    cache.put(key, REGION)
    assert key in cache


def test_a_damaged_index_ends_in_one_sentence(tmp_path: Path) -> None:
    for text, message in (("{", "is damaged"), (json.dumps({"format": "other"}), "not written by this version")):
        (tmp_path / "regions.json").write_text(text)
        with pytest.raises(DataError, match=message):
            RegionCache(tmp_path)


@pytest.mark.parametrize("region", [torch.full((2, 2), float("nan")), torch.ones(2, 2) * 1.5, torch.ones(1, 2, 2), torch.zeros(0, 3)])
def test_only_maps_in_0_to_1_are_stored(tmp_path: Path, region: torch.Tensor) -> None:
    with pytest.raises(DataError, match="must be a finite map"):
        RegionCache(tmp_path).put("00ff", region)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f2", "f4"])
@pytest.mark.parametrize("packed", [False, True])
def test_arrays_survive(tmp_path: Path, dtype: str, packed: bool) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_array(tmp_path / "a" / "x", array, packed=packed)
    assert np.array_equal(read_array(tmp_path / "a" / "x"), array) and read_array(tmp_path / "a" / "x").dtype == np.dtype(dtype)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"], "no temporary file stays"


def test_a_deflated_bomb_in_a_cache_is_refused(tmp_path: Path) -> None:
    import hashlib
    import struct
    import zlib

    head, payload = struct.pack("<4sBBBB2I", b"MWM1", 1, 1, 2, 0, 4, 4), zlib.compress(b"\0" * (1 << 26), 9)
    (tmp_path / "x").write_bytes(head + hashlib.blake2b(head + payload, digest_size=16).digest() + payload)
    with pytest.raises(CorruptEntry):
        read_array(tmp_path / "x")


def test_a_killed_writer_leaves_whole_entries_only(tmp_path: Path) -> None:
    code = ("import sys, numpy as np\nfrom pathlib import Path\nfrom mwm.data.blob import write_array\n"
            "print('go', flush=True)\nk = 0\nwhile True:\n    write_array(Path(sys.argv[1]) / f'{k % 7}.region', np.full((300, 300), k % 251, 'u1'), packed=False)\n    k += 1\n")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    entries = [path for path in tmp_path.iterdir() if path.suffix == ".region"]
    assert entries
    for path in entries:
        assert len(np.unique(read_array(path))) == 1


@pytest.mark.parametrize(("values", "expected"), [
    (np.array([[0, 255], [255, 0]], np.uint8), [0, 1, 1, 0]), (np.array([[0, 1], [1, 0]], np.uint8), [0, 1, 1, 0]), (np.array([[0, 1], [2, 3]], np.uint8), [0, 1, 1, 1]),
    (np.array([[0, 100], [200, 0]], np.uint8), [0, 1, 1, 0]), (np.array([[0, 51], [255, 0]], np.uint8), [0, 0.2, 1, 0]), (np.array([[0, 3], [1, 0]], np.uint16), [0, 1, 1, 0]),
])
def test_binary_soft_and_label_masks_are_told_apart(png, values: np.ndarray, expected: list[float]) -> None:
    assert read_mask(png("m.png", values)).flatten().tolist() == pytest.approx(expected)


def test_one_label_can_be_chosen(png) -> None:
    assert read_mask(png("m.png", np.array([[0, 1], [2, 2]], np.uint8)), label=2).flatten().tolist() == [0, 0, 1, 1]


def test_float_masks_must_be_finite(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "m.tif", np.array([[0, 0.25], [1, 0]], np.float32))
    assert read_mask(tmp_path / "m.tif").flatten().tolist() == [0, 0.25, 1, 0]
    tifffile.imwrite(tmp_path / "m.tif", np.array([[0, np.nan]], np.float32))
    with pytest.raises(DataError, match="finite"):
        read_mask(tmp_path / "m.tif")
    (tmp_path / "m.tif").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"m\.tif cannot be used"):
        read_mask(tmp_path / "m.tif")


def test_a_mask_of_the_wrong_size_is_refused_and_a_smaller_copy_is_not(png) -> None:
    path = png("m.png", np.full((50, 40), 255, np.uint8))
    assert read_mask(path, (100, 80)).shape == (100, 80) and read_mask(path, (101, 80)).shape == (101, 80)
    for size in ((40, 50), (100, 100), (100, 85)):
        with pytest.raises(DataError, match=r"m\.png must have the shape of its image, got 50 x 40"):
            read_mask(path, size)


def test_masks_are_found_by_name_and_stem(tmp_path: Path, png) -> None:
    for name in ("a/1.png", "a/2.jpg", "3.png", "4.png", "5.png"):
        png(f"scans/{name}", ramp().astype(np.uint8))
    for name in ("a/1.png", "2_mask.png", "3-seg.tif", "4.png"):
        png(f"masks/{name}", ramp().astype(np.uint8))
    folder = MaskFolder(tmp_path / "masks")
    found = {r.name: (f.relative_to(tmp_path / "masks").as_posix() if (f := folder.find(r)) else None) for r in read_list(tmp_path / "scans")}
    assert found == {"a/1.png": "a/1.png", "a/2.jpg": "2_mask.png", "3.png": "3-seg.tif", "4.png": "4.png", "5.png": None}
    png("masks/x/4.tif", ramp().astype(np.uint8))
    png("masks/2_mask.tif", ramp().astype(np.uint8))
    with pytest.raises(DataError, match="must have one mask, got 2"):
        [MaskFolder(tmp_path / "masks").find(r) for r in read_list(tmp_path / "scans")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must hold regions or masks, got none"):
        open_regions(tmp_path / "empty")


def test_a_link_out_of_a_folder_of_masks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "masks" / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="a link to a place outside"):
        MaskFolder(tmp_path / "masks")


def test_one_mask_is_not_given_to_images_of_two_folders(tmp_path: Path, png) -> None:
    """Patients' folders often hold files of the same names; the mask of one patient had been used for all of them."""
    for name in ("images/a/1.png", "images/b/1.png", "masks/1.png"):
        png(name, ramp().astype(np.uint8))
    first, second = read_list(tmp_path / "images")
    folder = MaskFolder(tmp_path / "masks")
    assert folder.find(first) == folder.find(first) == tmp_path / "masks" / "1.png"
    with pytest.raises(DataError, match=r"1\.png fits both a/1\.png and b/1\.png"):
        folder.find(second)
