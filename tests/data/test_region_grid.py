"""Soft regions kept as grid and outline: as small as promised, equal to a step of 1/255, plain pixels wherever that would not hold, and nothing else is taken for one."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mwm.data import DataError, RegionCache, open_regions
from mwm.data.blob import CorruptEntry, read_array, write_array
from mwm.data.region_grid import decode, encode
from mwm.ops import region_coverage

SIZES = [((14, 14), (512, 512)), ((14, 14), (500, 333)), ((7, 7), (224, 224)), ((12, 9), (97, 130)), ((2, 1), (16, 16)), ((24, 24), (1024, 100)), ((16, 16), (64, 64))]


def soft(grid: tuple[int, int], size: tuple[int, int], seed: int = 0, cut: float = 0.5) -> tuple[Tensor, Tensor]:
    """A map as localizers make it, from the least (0) to the most (1), and its values inside an outline. float32 [H, W] each"""
    values = torch.rand((1, 1, *grid), generator=torch.Generator().manual_seed(seed))
    heat = F.interpolate(values, size, mode="bilinear", align_corners=False)[0, 0]
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-9)
    return heat, torch.where(heat >= cut, heat, torch.zeros(()))


def eight(region: Tensor) -> np.ndarray:
    return (region * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_every_pixel_is_kept_to_one_step_and_the_outline_exactly(grid: tuple[int, int], size: tuple[int, int]) -> None:
    for seed in range(4):
        heat, region = soft(grid, size, seed)
        values = eight(region)
        found = decode(encode(values, heat.numpy(), grid))
        assert found.shape == size and found.dtype == np.uint8
        assert np.abs(found.astype(int) - values).max() <= 1 and np.array_equal(found > 0, values > 0)


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.8])
def test_patches_count_as_before_but_at_a_tie(cut: float) -> None:
    for seed in range(6):
        heat, region = soft((14, 14), (224, 224), seed, cut)
        found = torch.from_numpy(decode(encode(eight(region), heat.numpy(), (14, 14))).astype(np.float32) / 255)
        before, after = (F.avg_pool2d(one[None, None], 32)[0, 0] for one in (region, found))
        assert float((before - after).abs().max()) <= 1 / 255
        here, there = (region_coverage(one[None], (7, 7), min_cover=0.25)[0] for one in (region, found))
        assert torch.equal(here, there) or bool(((before - 0.25).abs()[here != there] <= 1 / 255).all())


def test_soft_regions_shrink_by_far_and_masks_stay_as_they_were(tmp_path: Path) -> None:
    cache, plain = RegionCache(tmp_path / "grid"), RegionCache(tmp_path / "plain")
    heat, region = soft((14, 14), (512, 512))
    for store, more in ((cache, {"surface": heat, "grid": (14, 14)}), (plain, {})):
        store.put("ab" * 16, region, **more)
    sizes = [next((tmp_path / name).rglob("*.region")).stat().st_size for name in ("grid", "plain")]
    assert sizes[0] * 8 < sizes[1]
    assert float((cache.get("ab" * 16) - plain.get("ab" * 16)).abs().max()) <= 1 / 255 + 1e-6


@pytest.mark.parametrize("spoil", ["pixel", "other grid", "other map", "too coarse an image", "hole"])
def test_what_a_grid_cannot_give_is_kept_as_pixels(spoil: str, tmp_path: Path) -> None:
    heat, region = soft((14, 14), (128, 96))
    grid = (14, 14)
    if spoil == "pixel":
        region[64, 48] = 0.9 if float(region[64, 48]) < 0.5 else 0.55
    elif spoil == "other grid":
        grid = (5, 9)
    elif spoil == "other map":
        heat = soft((14, 14), (128, 96), seed=3)[0]
    elif spoil == "too coarse an image":
        heat, region = soft((14, 14), (28, 28))
    elif spoil == "hole":
        region = torch.where(heat >= 0.5, 1.0, 0.0)
    assert encode(eight(region), heat.numpy(), grid) is None
    cache = RegionCache(tmp_path / "regions")
    cache.put("cd" * 16, region, surface=heat, grid=grid)
    assert torch.equal(cache.get("cd" * 16), torch.from_numpy(eight(region).astype(np.float32) / np.float32(255)))
    cache.save()
    assert json.loads((tmp_path / "regions" / "regions.json").read_text())["format"] == "mwm regions 1"


def test_index_tells_versions_before_that_they_cannot_read_it_and_older_folders_are_read(tmp_path: Path) -> None:
    heat, region = soft((14, 14), (128, 128))
    old = RegionCache(tmp_path / "regions")
    old.put("aa" * 16, region)
    old.assign(1, "aa" * 16)
    old.save()
    index = tmp_path / "regions" / "regions.json"
    assert json.loads(index.read_text())["format"] == "mwm regions 1"
    both = RegionCache(tmp_path / "regions")
    both.put("bb" * 16, region, surface=heat, grid=(14, 14))
    both.assign(2, "bb" * 16)
    both.save(part=(0, 2))
    assert json.loads(index.read_text())["format"] == "mwm regions 1"
    RegionCache(tmp_path / "regions").merge(2)
    assert json.loads(index.read_text())["format"] == "mwm regions 2"
    found = open_regions(tmp_path / "regions")
    assert torch.equal(found.region(1), torch.from_numpy(eight(region).astype(np.float32) / np.float32(255)))
    assert float((found.region(2) - found.region(1)).abs().max()) <= 1 / 255 + 1e-6
    index.write_text(index.read_text().replace("mwm regions 2", "mwm regions 3"))
    with pytest.raises(DataError, match="was not written by this version"):
        open_regions(tmp_path / "regions")


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(2**26, 1, 1000, 1), (8192, 8192, 8192, 1), (2**17, 16, 64, 1), (64, 64, 65, 1), (20, 20, 10, 10), (4, 4, 5, 1)])
def test_an_entry_that_asks_for_more_than_it_is_worth_is_refused_at_once(height: int, width: int, rows: int, columns: int, tmp_path: Path) -> None:
    data = struct.pack("<BIIHH", 1, height, width, rows, columns) + bytes(2 * rows * columns + -(-height * width // 8))
    cache = RegionCache(tmp_path / "regions")
    write_array(cache._path("ef" * 16), np.frombuffer(data, np.uint8), packed=True)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(KeyError):
        cache.get("ef" * 16)
    assert time.process_time() - began < 1 and tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_another_process_that_wrote_no_grid_does_not_take_the_mark_of_those_that_did_away(tmp_path: Path) -> None:
    heat, region = soft((14, 14), (128, 128))
    plain, grids = RegionCache(tmp_path / "regions"), RegionCache(tmp_path / "regions")
    grids.put("bb" * 16, region, surface=heat, grid=(14, 14))
    grids.assign(2, "bb" * 16)
    grids.save()
    plain.put("aa" * 16, region)
    plain.assign(1, "aa" * 16)
    plain.save()
    stored = json.loads((tmp_path / "regions" / "regions.json").read_text())
    assert stored["format"] == "mwm regions 2" and len(stored["regions"]) == 2


@pytest.mark.parametrize("wrong", ["short", "long", "version", "no rows", "more rows than pixels", "giant", "empty"])
def test_damaged_entries_are_missing_not_misread(wrong: str, tmp_path: Path) -> None:
    heat, region = soft((4, 4), (32, 32))
    entry = encode(eight(region), heat.numpy(), (4, 4)).copy()
    if wrong == "short":
        entry = entry[:-1]
    elif wrong == "long":
        entry = np.append(entry, np.uint8(0))
    elif wrong == "version":
        entry[0] = 9
    elif wrong == "no rows":
        entry[9:11] = 0
    elif wrong == "more rows than pixels":
        entry[9:11] = 255
    elif wrong == "giant":
        entry[1:9] = 255
    else:
        entry = entry[:0]
    if wrong != "empty":
        with pytest.raises(CorruptEntry):
            decode(entry)
    cache = RegionCache(tmp_path / "regions")
    write_array(cache._path("ef" * 16), entry, packed=True)
    assert read_array(cache._path("ef" * 16)).ndim == 1
    with pytest.raises(KeyError):
        cache.get("ef" * 16)
