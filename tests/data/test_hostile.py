"""Files that are broken or mean harm end in one sentence, and no header value or path is in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from image_files import bomb_png, ramp
from PIL import Image

from mwm.data import DataError, PretrainDataset, ReadSettings, SkippedFiles, UnreadableImage, content_digest, read_image, read_list, scan


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for width, height in ((100_000, 100_000), (9000, 9000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(UnreadableImage, match=r"more than the limit|claims more pixels|damaged"):
            read_image(bomb_png(tmp_path / "bomb.png", width, height))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # KiB


def test_a_png_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage):
        read_image(bomb_png(tmp_path / "bomb.png", 4000, 4000))


def test_a_tiff_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((16, 16), np.uint8))
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for name in ("ImageWidth", "ImageLength"):
            tag = file.pages[0].tags[name]
            data[tag.valueoffset : tag.valueoffset + 4] = (60_000).to_bytes((tag.dtype == 3 and 2) or 4, "little").ljust(4, b"\0")
    path.write_bytes(bytes(data))
    with pytest.raises(UnreadableImage, match="more than the limit"):
        read_image(path)


def test_a_deflated_dicom_bomb_is_refused_and_an_honest_one_is_read(tmp_path: Path, dicom, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    pixels = np.zeros((600, 600), np.uint16)
    path = dicom("a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian)
    assert path.stat().st_size < 4000 and read_image(path).shape == (1, 600, 600)
    monkeypatch.setattr("mwm.data.readers.dicom.MAX_INFLATED", 100_000)
    with pytest.raises(UnreadableImage, match="inflates to more than"):
        read_image(path)


@pytest.mark.parametrize("head", ["without its length", "with a wrong length", "with a long element before the syntax", "without types"])
def test_a_deflated_dicom_bomb_with_an_odd_head_is_refused(tmp_path: Path, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of the head is no more than a claim: pydicom inflates without it, too."""
    import struct
    import zlib

    def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
        long = struct.pack("<HI", 0, len(value)) if kind in (b"OB", b"OW") else struct.pack("<H", len(value))
        return struct.pack("<HH2s", group, number, kind) + long + value

    syntax, length = b"1.2.840.10008.1.2.1.99", b""
    if head == "with a wrong length":
        length = element(2, 0, b"UL", struct.pack("<I", 4000))
    if head == "with a long element before the syntax":
        length = element(2, 1, b"OB", b"\0" * 2000)
    meta = length + element(2, 0x10, b"UI", syntax)
    if head == "without types":
        meta = struct.pack("<HHI", 2, 0x10, len(syntax)) + syntax
    numbers = {0x10: 600, 0x11: 600, 0x100: 16, 0x101: 16, 0x102: 15, 0x103: 0}
    values = element(0x28, 2, b"US", b"\1\0") + element(0x28, 4, b"CS", b"MONOCHROME2 ")
    values += b"".join(element(0x28, number, b"US", struct.pack("<H", value)) for number, value in numbers.items())
    packed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packed.compress(values + element(0x7FE0, 0x10, b"OW", bytes(720_000))) + packed.flush()
    path = tmp_path / "a.dcm"
    path.write_bytes(b"\0" * 128 + b"DICM" + meta + body)
    if head != "without types":  # pydicom reads it
        assert read_image(path).shape == (1, 600, 600)
    monkeypatch.setattr("mwm.data.readers.dicom.MAX_INFLATED", 100_000)
    with pytest.raises(UnreadableImage, match=r"inflates to more than|head of this deflated file is damaged"):
        read_image(path)


@pytest.mark.parametrize("spacing", [b"1.0\\nan ", b"1.0\\inf ", b"1e-320\\1e-320 ", b"1e300\\1e-300", b"0\\1 ", b"x\\y ", b"\\"])
@pytest.mark.parametrize("aspect", ["pad", "crop"])
@pytest.mark.filterwarnings("ignore")
def test_a_pixel_spacing_that_is_none_is_not_used(tmp_path: Path, dicom, spacing: bytes, aspect: str) -> None:
    """Such a header ended the whole run: the image's new size is no number."""
    path, settings = dicom("a.dcm", ramp(8, 10).astype(np.uint16), Modality="MR"), ReadSettings(size=(32, 32), aspect=aspect)
    wanted = read_image(path, settings)
    data = path.read_bytes()
    at = data.index(b"\x28\x00\x00\x01US")  # the elements are in order: before BitsAllocated
    padded = spacing.ljust(len(spacing) + len(spacing) % 2)
    path.write_bytes(data[:at] + b"\x28\x00\x30\x00DS" + len(padded).to_bytes(2, "little") + padded + data[at:])
    assert bool((read_image(path, settings) == wanted).all())


@pytest.mark.parametrize("extension", ["png", "jpg", "tif"])
@pytest.mark.parametrize("kept", [0, 3, 60, 0.5, 0.95])
def test_truncated_files_are_unreadable(tmp_path: Path, extension: str, kept: float) -> None:
    whole, cut = tmp_path / f"whole.{extension}", tmp_path / f"cut.{extension}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(kept if kept > 1 or kept == 0 else kept * len(data))])
    with pytest.raises(UnreadableImage) as caught:
        read_image(cut)
    assert str(tmp_path) not in str(caught.value) and str(caught.value).startswith(f"cut.{extension} cannot be used: ")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.dcm", "a.nii", "a.nii.gz"])
@pytest.mark.filterwarnings("ignore")
def test_noise_and_text_are_unreadable(tmp_path: Path, name: str) -> None:
    for content in (b"hello, I am a text. " * 60,
                    np.random.default_rng(1).bytes(5000), b"\0" * 5000, b"II*\0" + b"\xff" * 300,
                    b"\x1f\x8b" + b"x" * 200, b"\0" * 128 + b"DICM" + b"z" * 99):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / name)
        assert len(read_list(tmp_path / name)) == 1, "listing never fails because of one file"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["png", "tif", "dcm", "nii"])
def test_flipped_bytes_never_end_in_another_error(tmp_path: Path, family: str, dicom, nifti) -> None:
    path = {"png": lambda: _saved(tmp_path / "a.png"), "tif": lambda: _saved(tmp_path / "a.tif"), "dcm": lambda: dicom("a.dcm", ramp().astype(np.uint16)),
            "nii": lambda: nifti("a.nii", np.zeros((4, 4, 2), np.int16))}[family]()
    data, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data)
        for position in random.integers(0, min(len(data), 600), 3):
            broken[position] = random.integers(256)
        path.write_bytes(bytes(broken))
        try:
            record = read_list(path)[0]
            image = read_image(record)
        except UnreadableImage:
            continue
        assert bool(((image >= 0) & (image <= 1)).all())


def test_missing_file_folder_and_unreadable_are_told(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match="there is no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="no regular file"):
        read_image(tmp_path)


def test_scan_leaves_out_counts_and_lists(tmp_path: Path, png) -> None:
    for k in range(4):
        png(f"{k}.png", ramp().astype(np.uint8))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    records = read_list(tmp_path)
    kept, skipped = scan(records)
    assert [r.name for r in kept] == ["0.png", "2.png", "3.png"] and [name for name, _ in skipped] == ["1.png"]
    skipped.write(tmp_path / "skipped.csv")
    text = (tmp_path / "skipped.csv").read_text()
    assert text.startswith("file,reason\n1.png,") and str(tmp_path) not in text
    assert "skipped 1 files" in str(skipped)
    SkippedFiles().write(tmp_path / "skipped.csv")
    assert not (tmp_path / "skipped.csv").exists()
    with pytest.raises(UnreadableImage, match=r"1\.png"):
        scan(records, strict=True)
    with pytest.raises(DataError, match="at least one of the 1 files must be readable"):
        scan(records[1:2])


def test_batches_of_scanned_records_keep_their_size(tmp_path: Path, png) -> None:
    from torch.utils.data import DataLoader

    from mwm.data import EpochSampler, collate

    for k in range(9):
        png(f"{k}.png", ramp(8, 8).astype(np.uint8))
    (tmp_path / "4.png").write_bytes(b"no image")
    kept, _ = scan(read_list(tmp_path))
    dataset = PretrainDataset(kept, ReadSettings(size=(8, 8)))
    batches = list(DataLoader(dataset, batch_size=4, sampler=EpochSampler(len(kept), 0, 0), collate_fn=collate))
    assert [b["image"].shape for b in batches] == [(4, 1, 8, 8)] * 2


def _saved(path: Path) -> Path:
    Image.fromarray(ramp(32, 32).astype(np.uint8)).save(path)
    return path


def test_a_tiff_whose_pages_go_in_circles_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, ramp(16, 16).astype(np.uint8), metadata=None)
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[4:8], "little")
    entries = int.from_bytes(data[start : start + 2], "little")
    data[start + 2 + 12 * entries : start + 6 + 12 * entries] = data[4:8]  # the next page is this one
    path.write_bytes(bytes(data))
    try:
        assert read_image(read_list(path)[0]).shape == (1, 16, 16)
    except UnreadableImage:
        pass


@pytest.mark.parametrize("name", ["a.png", "a.dcm"])
def test_a_pipe_in_a_list_is_refused_instead_of_waited_for(tmp_path: Path, name: str) -> None:
    """Listing looks into .dcm files, and the key of a cache hashes every file: both would wait for a writer for ever."""
    import os
    import signal

    os.mkfifo(tmp_path / name)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.png")
    (tmp_path / "list.csv").write_text(f"file\n{name}\nb.png\n")

    def late(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        pipe = read_list(tmp_path / "list.csv")[0]
        for look in (content_digest, read_image):
            with pytest.raises(UnreadableImage, match=f"{name} cannot be used: it is no regular file"):
                look(pipe)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_beyond_the_limit_is_not_hashed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(5 * 2**30)  # a hole; reading it takes seconds, a larger one for ever
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be used: it has more than 4 GiB"):
        content_digest(path)
