"""How regions are best kept on disk: bytes, time to write, time to open in a data loader. `python bench/region_files.py [COUNT]` prints a table.

Maps as localizers make them at 512 x 512: masks of one to three blobs, and soft maps, bilinear from a grid of 14 x 14. Formats: 8 bits (round(255 r), the
precision in which patches are counted), the same at a quarter of the edge, float16, the float16 grid alone, and, of soft maps, grid and outline
(`mwm.data.region_grid`), all deflated; a file each, with and without fsync, or all in one shard with offsets. "Open" is one region in random order as float32.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mwm.data import blob, region_grid


def maps(count: int, soft: bool) -> list[np.ndarray]:
    """float32 [512, 512] each, in [0, 1]"""
    place = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        grid = F.avg_pool2d(torch.rand(1, 1, 16, 16, generator=place), 3, 1) ** 3
        heat = F.interpolate(grid, (512, 512), mode="bilinear", align_corners=False)[0, 0]
        heat = (heat - heat.min()) / (heat.max() - heat.min())
        made.append((heat if soft else (heat > 0.7).float()).numpy())
    return made


def eight(region: np.ndarray) -> np.ndarray:
    return np.round(region * 255).astype(np.uint8)


def half(region: np.ndarray) -> np.ndarray:
    return region.astype(np.float16)


def grid(region: np.ndarray) -> np.ndarray:
    return F.interpolate(torch.from_numpy(region)[None, None], (14, 14), mode="area")[0, 0].numpy().astype(np.float16)


def quarter(region: np.ndarray) -> np.ndarray:
    return eight(F.interpolate(torch.from_numpy(region)[None, None], (128, 128), mode="area")[0, 0].numpy())


def outlined(region: np.ndarray) -> np.ndarray:
    return region_grid.encode(eight(region), region, (14, 14))


def back(stored: np.ndarray) -> np.ndarray:
    """What a data set gets. float32 [512, 512]"""
    if stored.ndim == 1:
        return region_grid.decode(stored).astype(np.float32) / np.float32(255)
    wide = torch.from_numpy(stored.astype(np.float32) / np.float32(255 if stored.dtype == np.uint8 else 1))
    return wide.numpy() if wide.shape[0] == 512 else F.interpolate(wide[None, None], (512, 512), mode="bilinear", align_corners=False)[0, 0].numpy()


def in_files(folder: Path, regions: list[np.ndarray], encode, *, durable: bool) -> tuple[float, float, int, float]:
    """Seconds to write all and to open all, bytes on disk, largest error."""
    keys = [blob.key(str(index)) for index in range(len(regions))]
    paths = [folder / key[:2] / f"{key[2:]}.region" for key in keys]
    begin = time.perf_counter()
    for path, region in zip(paths, regions, strict=True):
        if durable:
            blob.write_array(path, encode(region), packed=True)
        else:
            fsync, os.fsync = os.fsync, lambda _: None
            blob.write_array(path, encode(region), packed=True)
            os.fsync = fsync
    wrote = time.perf_counter() - begin
    order = np.random.default_rng(1).permutation(len(paths))
    begin = time.perf_counter()
    for index in order:
        back(blob.read_array(paths[index]))
    opened = time.perf_counter() - begin
    error = max(float(np.abs(back(blob.read_array(path)) - region).max()) for path, region in zip(paths[:50], regions, strict=False))
    return wrote, opened, sum(4096 * -(-path.stat().st_size // 4096) for path in paths), error


def in_shard(folder: Path, regions: list[np.ndarray], encode) -> tuple[float, float, int, float]:
    """The same, one file with an entry after the other and an fsync every 64."""
    offsets, path = [], folder / "shard"
    begin = time.perf_counter()
    with path.open("wb") as file:
        for index, region in enumerate(regions):
            packed = zlib.compress(encode(region).tobytes(), 3)
            offsets.append((file.tell() + 4, len(packed)))
            file.write(struct.pack("<I", len(packed)) + packed)
            if index % 64 == 63:
                file.flush()
                os.fsync(file.fileno())
    wrote = time.perf_counter() - begin
    dtype, shape = encode(regions[0]).dtype, [encode(region).shape for region in regions]
    order = np.random.default_rng(1).permutation(len(regions))
    descriptor = os.open(path, os.O_RDONLY)

    def read(index: int) -> np.ndarray:
        start, length = offsets[index]
        return back(np.frombuffer(zlib.decompress(os.pread(descriptor, length, start)), dtype).reshape(shape[index]))

    begin = time.perf_counter()
    for index in order:
        read(index)
    opened = time.perf_counter() - begin
    error = max(float(np.abs(read(index) - regions[index]).max()) for index in range(min(50, len(regions))))
    os.close(descriptor)
    return wrote, opened, path.stat().st_size, error


def main(count: int) -> None:
    """Print the table: the least of three rounds."""
    torch.set_num_threads(1)
    print(f"{count} maps of 512 x 512\n{'maps':6} {'values':16} {'files':17} {'KiB each':>9} {'write ms':>9} {'open ms':>8} {'largest error':>14}")
    ways = {"one each, fsync": partial(in_files, durable=True), "one each": partial(in_files, durable=False), "shard": in_shard}
    for kind in ("mask", "soft"):
        regions = maps(count, kind == "soft")
        for values, encode in (("8 bits", eight), ("8 bits 128x128", quarter), ("float16", half), ("float16 14x14", grid), ("grid, outline", outlined)):
            if kind == "mask" and encode is outlined:
                continue
            for name, write in ways.items():
                rounds = []
                for _ in range(3):
                    with tempfile.TemporaryDirectory() as folder:
                        rounds.append(write(Path(folder), regions, encode))
                wrote, opened = (1000 * min(one[place] for one in rounds) / count for place in (0, 1))
                print(f"{kind:6} {values:16} {name:17} {rounds[0][2] / 1024 / count:9.2f} {wrote:9.3f} {opened:8.3f} {rounds[0][3]:14.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
