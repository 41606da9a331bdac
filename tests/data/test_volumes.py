"""DICOM and NIfTI: units, windows, frames, orientation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import ramp

from mwm.data import ReadSettings, UnreadableImage, read_image, read_list
from mwm.data.readers import read

STORED = ReadSettings()


def test_rescale_gives_hounsfield_units(dicom) -> None:
    path = dicom("a.dcm", ramp(6, 8, 2000).astype(np.uint16), Modality="CT", RescaleSlope="2", RescaleIntercept="-1024")
    raw = read(path, None, STORED)
    assert raw.is_ct and np.array_equal(raw.values[0], ramp(6, 8, 2000) * 2.0 - 1024)
    image = read_image(path, intensity="window=40,400")
    assert torch.allclose(image[0], torch.from_numpy((ramp(6, 8, 2000) * 2.0 - 1024 + 160) / 400).clamp(0, 1).float(), atol=1e-6)
    assert torch.equal(read_image(path), image), "auto: CT without a window in the header is soft tissue"


def test_auto_takes_the_window_of_the_header(dicom) -> None:
    pixels = ramp(6, 8, 1000).astype(np.uint16)
    path = dicom("a.dcm", pixels, Modality="DX", WindowCenter=["500", "40"], WindowWidth=["200", "400"])
    assert torch.allclose(read_image(path)[0], torch.from_numpy((pixels - 400.0) / 200).clamp(0, 1).float(), atol=1e-6)
    assert torch.equal(read_image(path, intensity="minmax")[0], torch.from_numpy(pixels / 1000).float())


def test_mri_is_mapped_by_percentiles(dicom) -> None:
    pixels = ramp(20, 20, 3000).astype(np.uint16)
    pixels[0, 0] = 65535
    low, high = np.percentile(pixels, (0.5, 99.5))
    image = read_image(dicom("a.dcm", pixels, Modality="MR"))
    assert torch.allclose(image[0], torch.from_numpy((pixels - low) / (high - low)).clamp(0, 1).float(), atol=1e-6)


def test_monochrome1_is_inverted(dicom) -> None:
    pixels = ramp(6, 8, 4095).astype(np.uint16)
    bright = read_image(dicom("a.dcm", pixels), intensity="minmax")
    dark = read_image(dicom("b.dcm", pixels, PhotometricInterpretation="MONOCHROME1"), intensity="minmax")
    assert torch.allclose(dark, 1 - bright)


def test_multi_frame_becomes_frames(tmp_path: Path, dicom) -> None:
    pixels = np.stack([ramp(6, 8, 100) + 500 * k for k in range(3)]).astype(np.uint16)
    path = dicom("a.dcm", pixels)
    records = read_list(tmp_path)
    assert [r.name for r in records] == ["a.dcm#f0", "a.dcm#f1", "a.dcm#f2"]
    for k, record in enumerate(records):
        assert np.array_equal(read(path, record.frame, STORED).values[0], pixels[k])
    with pytest.raises(UnreadableImage, match="holds 3 frames"):
        read_image(path)


def test_frames_have_their_own_rescale_and_window(dicom) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    def group(slope: str, centre: str) -> Dataset:
        transform, window, item = Dataset(), Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept = slope, "0"
        window.WindowCenter, window.WindowWidth = centre, "10"
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = Sequence([transform]), Sequence([window])
        return item

    path = dicom("a.dcm", np.ones((2, 3, 3), np.uint16), PerFrameFunctionalGroupsSequence=Sequence([group("1", "5"), group("3", "7")]))
    first, second = read(path, "f0", STORED), read(path, "f1", STORED)
    assert (first.values.max(), first.window, second.values.max(), second.window) == (1, (5.0, 10.0), 3, (7.0, 10.0))


def test_colour_dicom_is_colour(dicom) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    path = dicom("a.dcm", pixels[..., 0], SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", PixelData=pixels.tobytes() )
    assert torch.equal(read_image(path), torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


@pytest.mark.filterwarnings("ignore")
def test_dicom_that_holds_no_readable_pixels_is_told(dicom, tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGLSLossless

    cases = {
        "no pixel data": dicom("report.dcm", None),
        "truncated, or do not fit": dicom("short.dcm", ramp().astype(np.uint16), Rows=600),
        r"compression \(JPEG-LS Lossless.*pylibjpeg": dicom("packed.dcm", ramp().astype(np.uint16), syntax=JPEGLSLossless, PixelData=encapsulate([b"\xff\xd8" + b"\0" * 40])),
        "more than the limit": dicom("huge.dcm", ramp().astype(np.uint16), Rows=60000, Columns=60000),
    }
    for message, path in cases.items():
        with pytest.raises(UnreadableImage, match=message) as caught:
            read_image(path)
        assert "Secret" not in str(caught.value) and "SECRET" not in str(caught.value)


def radiological(volume: np.ndarray, k: int) -> np.ndarray:
    """Axial slice of a RAS volume: anterior up, the patient's left at image right."""
    return volume[::-1, ::-1, k].T


def test_axial_slices_show_the_patients_left_at_image_right(tmp_path: Path, nifti) -> None:
    volume = np.zeros((10, 12, 3), np.float32)
    volume[1, 6, 1] = 1.0  # small x: the patient's left in RAS+ coordinates
    volume[5, 11, 2] = 1.0  # large y: anterior
    nifti("a.nii.gz", volume)
    records = {r.frame: r for r in read_list(tmp_path)}
    left, front = read_image(records["z1"], intensity="minmax")[0], read_image(records["z2"], intensity="minmax")[0]
    assert left.shape == (12, 10) and left.argmax() % 10 > 5
    assert front.argmax() // 10 == 0


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
def test_canonical_slices_do_not_depend_on_how_the_volume_is_stored(tmp_path: Path, nifti, flips) -> None:
    volume = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    stored = volume[tuple(slice(None, None, f) for f in flips)]
    nifti("a.nii", np.ascontiguousarray(stored.transpose(2, 0, 1)), np.array([[0, flips[0], 0, 0], [0, 0, flips[1], 0], [flips[2], 0, 0, 0], [0, 0, 0, 1]], float))
    records = read_list(tmp_path)
    assert len(records) == 7
    for k, record in enumerate(records):
        assert np.allclose(read(record.path, record.frame, STORED).values[0], radiological(volume, k))


def test_slice_axis_and_stored_orientation(tmp_path: Path, nifti) -> None:
    volume = np.arange(5 * 6 * 7).reshape(5, 6, 7).astype(np.int16)
    nifti("a.nii", volume, np.diag([-1.0, -1, 1, 1]))
    for axis, length, letter in ((0, 5, "x"), (1, 6, "y"), (2, 7, "z")):
        for orientation in ("canonical", "stored"):
            settings = ReadSettings(slice_axis=axis, orientation=orientation)
            records = read_list(tmp_path, settings=settings)
            assert len(records) == length and records[0].frame == f"{letter}0"
            assert read_image(records[0], settings).shape[1:] == tuple(np.delete([5, 6, 7], axis)[::-1])
    settings = ReadSettings(orientation="stored")
    assert np.array_equal(read(tmp_path / "a.nii", "z3", settings).values[0], volume[:, :, 3].T)


def test_a_record_of_another_slice_axis_is_refused(tmp_path: Path, nifti) -> None:
    nifti("a.nii", np.zeros((4, 4, 4), np.int16))
    with pytest.raises(ValueError, match="slice along z, but slice_axis is 0"):
        read_image(read_list(tmp_path)[0], slice_axis=0)


def test_four_dimensions_become_volumes(tmp_path: Path, nifti) -> None:
    volume = np.random.default_rng(0).normal(size=(4, 5, 3, 2)).astype(np.float32)
    nifti("a.nii.gz", volume)
    records = read_list(tmp_path)
    assert [r.frame for r in records] == ["z0t0", "z1t0", "z2t0", "z0t1", "z1t1", "z2t1"]
    assert np.allclose(read(records[4].path, "z1t1", STORED).values[0], radiological(volume[..., 1], 1))


def test_slices_of_a_volume_share_one_intensity_mapping(tmp_path: Path, nifti) -> None:
    volume = np.random.default_rng(0).gamma(2, 100, (20, 20, 3)).astype(np.float32)
    volume[..., 1] *= 0.1
    nifti("a.nii", volume)
    images = [read_image(r) for r in read_list(tmp_path)]
    low, high = np.percentile(volume, (0.5, 99.5))
    assert torch.allclose(images[1][0], torch.from_numpy(radiological((volume - low) / (high - low), 1).copy()).float().clamp(0, 1), atol=1e-5)
    assert images[1].max() < 0.2 < images[0].max()


def test_a_volume_in_hounsfield_units_is_windowed(tmp_path: Path, nifti) -> None:
    volume = np.full((4, 4, 2), 40, np.int16)
    volume[0, 0] = -1000
    nifti("a.nii", volume)
    image = read_image(read_list(tmp_path)[0])
    assert image.max() == 0.5 and image.min() == 0


def test_values_that_are_not_finite_do_no_harm(tmp_path: Path, nifti) -> None:
    volume = np.random.default_rng(0).normal(size=(8, 8, 2)).astype(np.float32)
    volume[0, 0, 0], volume[1, 1, 0] = np.nan, np.inf
    volume[..., 1] = np.nan
    nifti("a.nii", volume)
    first, second = read_list(tmp_path)
    image = read_image(first)
    assert torch.isfinite(image).all() and image[0, 7, 7] < 1e-6
    with pytest.raises(UnreadableImage, match="no finite value"):
        read_image(second)


@pytest.mark.filterwarnings("ignore")
def test_broken_volumes_are_told(tmp_path: Path, nifti) -> None:
    import gzip

    whole = nifti("whole.nii.gz", np.random.default_rng(0).normal(size=(16, 16, 8)).astype(np.float32)).read_bytes()
    plain = bytearray(gzip.decompress(whole))
    (tmp_path / "short.nii.gz").write_bytes(whole[:2000])
    (tmp_path / "short.nii").write_bytes(bytes(plain[:1000]))
    huge = plain.copy()
    huge[40:56] = np.array([3, 32000, 32000, 32000, 1, 1, 1, 1], "<i2").tobytes()
    (tmp_path / "huge.nii").write_bytes(bytes(huge))
    for name in ("short.nii.gz", "short.nii", "huge.nii"):
        with pytest.raises(UnreadableImage):
            read_image(next(r for r in read_list(f"{tmp_path}/{name}")) if name.startswith("short") else tmp_path / name)
    (record,) = read_list(tmp_path / "huge.nii")
    with pytest.raises(UnreadableImage, match=r"volume|voxels"):
        read_image(record)


def test_compressed_and_old_files_are_read(tmp_path: Path, dicom) -> None:
    import pydicom
    from pydicom.uid import RLELossless

    pixels = ramp(12, 10, 4000).astype(np.uint16)
    path = dicom("a.dcm", pixels)
    header = pydicom.dcmread(path)
    header.compress(RLELossless)
    header.save_as(tmp_path / "rle.dcm")
    data = path.read_bytes()
    header = pydicom.dcmread(path)
    del header.PatientName, header.PatientID
    pydicom.dcmwrite(tmp_path / "old.dcm", pydicom.Dataset(header), implicit_vr=True, little_endian=True)
    assert data[128:132] == b"DICM" and (tmp_path / "old.dcm").read_bytes()[128:132] != b"DICM", "without preamble and file meta"
    for name in ("rle.dcm", "old.dcm"):
        assert np.array_equal(read(tmp_path / name, None, STORED).values[0], pixels), name


def test_signed_pixels_and_palettes_are_read(dicom) -> None:
    pixels = (ramp(6, 8, 3000) - 1500).astype(np.int16)
    assert np.array_equal(read(dicom("a.dcm", pixels), None, STORED).values[0], pixels)
    table = np.arange(256, dtype=np.uint16)[::-1] * 256
    lookup = {f"{colour}PaletteColorLookupTable{part}": value for colour in ("Red", "Green", "Blue")
              for part, value in (("Descriptor", [256, 0, 16]), ("Data", table.tobytes()))}
    path = dicom("b.dcm", ramp().astype(np.uint8), PhotometricInterpretation="PALETTE COLOR", **lookup)
    assert np.array_equal(read(path, None, STORED).values, np.stack([255 - ramp().astype(np.uint8)] * 3))


def test_no_header_text_reaches_what_a_reader_hands_on(dicom) -> None:
    raw = read(dicom("a.dcm", ramp().astype(np.uint16), Modality="CT", StudyDescription="SECRET"), None, STORED)
    assert "secret" not in repr(raw).lower()
