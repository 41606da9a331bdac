"""PNG, JPEG and TIFF: values, channels, depth."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import ramp
from PIL import Image

from mwm.data import ReadSettings, UnreadableImage, read_image, read_list
from mwm.data.readers import read

STORED = ReadSettings()


def stored(path: Path, frame: str | None = None) -> np.ndarray:
    return read(path, frame, STORED).values


def test_8_bit_grey_is_its_value_over_255(png) -> None:
    image = read_image(png("a.png", ramp().astype(np.uint8)))
    assert image.dtype == torch.float32 and image.shape == (1, 6, 8)
    assert torch.equal(image, torch.from_numpy(ramp().astype(np.uint8)).float()[None] / 255)


@pytest.mark.parametrize("top", [4095, 65535])
def test_16_bit_png_keeps_its_values(png, top: int) -> None:
    array = ramp(20, 30, top).astype(np.uint16)
    path = png("a.png", array)
    assert stored(path).dtype.itemsize >= 2 and np.array_equal(stored(path)[0], array)
    image = read_image(path, intensity="minmax")
    assert len(image.unique()) == 600, "no step of 8 bits merges values"
    assert torch.allclose(image, torch.from_numpy(array / top).float()[None], atol=1e-6)


def deep_png(path: Path, array: np.ndarray, kinds: list[int], colour: int) -> Path:
    """Write 16-bit samples [H, W, bands], row k with filter kinds[k % len(kinds)], straight from the specification."""
    data = array.astype(">u2").tobytes()
    height, width, bands = array.shape
    step, line = 2 * bands, 2 * bands * width
    rows = b""
    for y in range(height):
        kind = kinds[y % len(kinds)]
        here = data[y * line : (y + 1) * line]
        above = data[(y - 1) * line : y * line] if y else bytes(line)
        filtered = bytearray()
        for x in range(line):
            a, b, c = here[x - step] if x >= step else 0, above[x], above[x - step] if x >= step else 0
            nearest = min((abs(a + b - c - v), k, v) for k, v in enumerate((a, b, c)))[2]
            filtered.append((here[x] - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
        rows += bytes([kind]) + bytes(filtered)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = zlib.compress(rows)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)) + chunk(b"tEXt", b"k\0v")
                     + chunk(b"IDAT", packed[:50]) + chunk(b"IDAT", packed[50:]) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize("kinds", [[0], [1], [2], [3], [4], [4, 3, 2, 1, 0]])
def test_16_bit_colour_png_keeps_its_values_under_every_filter(tmp_path: Path, kinds: list[int], colour: int, bands: int) -> None:
    array = np.random.default_rng(0).integers(0, 65536, (9, 7, bands), dtype=np.uint16)
    path = deep_png(tmp_path / "a.png", array, kinds, colour)
    assert np.array_equal(np.moveaxis(stored(path), 0, 2), array[..., : 1 if bands == 2 else 3])
    with Image.open(path) as image:  # Pillow, which keeps the upper bytes only, agrees on them
        assert np.array_equal(np.asarray(image)[..., 0], array[..., 0] >> 8)


def test_truncated_16_bit_colour_png_is_unreadable(tmp_path: Path) -> None:
    path = deep_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 65536, (9, 7, 3), dtype=np.uint16), [0], 2)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableImage, match="truncated"):
        read_image(path)


def test_colour_keeps_three_channels_and_converts_when_asked(png) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path = png("a.png", array)
    assert torch.equal(read_image(path), torch.from_numpy(array).permute(2, 0, 1).float() / 255)
    grey = read_image(path, channels=1)
    assert grey.shape == (1, 5, 6) and torch.allclose(grey[0, 0, 0], torch.tensor(float(array[0, 0] @ [0.299, 0.587, 0.114]) / 255), atol=1e-6)
    assert torch.equal(read_image(png("g.png", array[..., 0]), channels=3)[2], read_image(png("g.png", array[..., 0]))[0])
    with pytest.raises(UnreadableImage, match="channels must be 3 or convertible"):
        read_image(path, channels=2)


@pytest.mark.parametrize("mode", ["1", "LA", "RGBA", "P", "CMYK"])
def test_other_modes_become_grey_or_colour(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(ramp(16, 16).astype(np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape[0] in (1, 3) and image.max() > 0.9 and image.min() < 0.1


def test_a_grey_palette_becomes_one_channel(tmp_path: Path) -> None:
    Image.fromarray(ramp().astype(np.uint8)).convert("P").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape[0] == 1


def test_exif_orientation_is_applied_unless_stored_is_asked(tmp_path: Path) -> None:
    image = Image.fromarray(ramp(8, 16).astype(np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert read_image(tmp_path / "a.jpg").shape == (1, 16, 8)
    assert read_image(tmp_path / "a.jpg", orientation="stored").shape == (1, 8, 16)


@pytest.mark.parametrize(("dtype", "colour"), [(d, c) for d in (np.uint8, np.uint16, np.int16, np.float32, np.uint32) for c in (False, True) if not (c and d == np.int16)])
def test_tiff_keeps_values_of_every_depth(tmp_path: Path, dtype, colour: bool) -> None:
    array = (ramp(9, 7, 250) - (100 if np.dtype(dtype).kind in "if" else 0)).astype(dtype)
    if np.dtype(dtype).itemsize > 1:
        array = array * 100
    array = array.astype(dtype)
    array = np.stack([array, array // 2, array * 0], -1) if colour else array
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb" if colour else "minisblack")
    expected = np.moveaxis(array, 2, 0) if colour else array[None]
    assert np.array_equal(stored(tmp_path / "a.tif"), expected)
    image = read_image(tmp_path / "a.tif")
    assert image.shape[0] == len(expected) and 0 <= image.min() and image.max() <= 1


def test_lzw_tiff_is_read_without_extra_packages(tmp_path: Path) -> None:
    array = ramp(20, 20, 255).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "a.tif", compression="tiff_lzw")
    assert np.array_equal(stored(tmp_path / "a.tif")[0], array)
    deep = ramp(20, 20, 60000).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "b.tif", compression="tiff_adobe_deflate")
    assert np.array_equal(stored(tmp_path / "b.tif")[0], deep)


def test_white_is_zero_tiff_is_inverted(tmp_path: Path) -> None:
    array = ramp().astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="miniswhite")
    assert torch.allclose(read_image(tmp_path / "a.tif")[0], 1 - torch.from_numpy(array).float() / 255)


def test_tiff_stack_becomes_frames(tmp_path: Path) -> None:
    array = np.stack([ramp().astype(np.uint16) + 1000 * k for k in range(3)])
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    records = read_list(tmp_path)
    assert [r.name for r in records] == ["a.tif#f0", "a.tif#f1", "a.tif#f2"]
    assert np.array_equal(stored(tmp_path / "a.tif", "f2")[0], array[2])
    assert read_image(records[1]).shape == (1, 6, 8)
    with pytest.raises(UnreadableImage, match="holds 3 images; pass the record"):
        read_image(tmp_path / "a.tif")


def test_tiff_with_many_channels_keeps_them(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (5, 6, 7), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", metadata={"axes": "CYX"})
    assert np.array_equal(stored(tmp_path / "a.tif"), array)
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(array, 0, 2), photometric="minisblack", planarconfig="contig")
    assert np.array_equal(stored(tmp_path / "b.tif"), array)


def test_content_goes_before_the_extension(png, tmp_path: Path) -> None:
    path = png("a.png", ramp().astype(np.uint8))
    path.rename(tmp_path / "a.dcm")
    assert read_image(tmp_path / "a.dcm").shape == (1, 6, 8)


def test_one_pixel_is_an_image(png) -> None:
    assert read_image(png("a.png", np.full((1, 1), 51, np.uint8))).tolist() == [[[pytest.approx(0.2)]]]
    assert read_image(png("b.png", np.full((1, 1), 3000, np.uint16)), size=(4, 4)).shape == (1, 4, 4)
