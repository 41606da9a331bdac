"""What is written for slices of a volume lies on the voxels they were read from, whatever the stored orientation."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel
import numpy as np
import pytest

from mwm.data import DataError, ReadSettings, read_image, read_list
from mwm.data.volumes import write_volume


def volume_file(folder: Path, affine: np.ndarray, shape: tuple[int, ...] = (5, 6, 7), name: str = "v.nii.gz", **header) -> Path:
    values = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    image = nibabel.Nifti1Image(values, affine)
    image.header["descrip"] = b"SMITH^JOHN"
    for key, value in header.items():
        image.header[key] = value
    nibabel.save(image, folder / name)
    return folder / name


def copy_by_slices(source: Path, out: Path, settings: ReadSettings) -> None:
    """Read every slice as a user's network sees it, and write it back."""
    slices = {record.frame: np.rint(read_image(record, settings)[0].numpy() * 255).astype(np.uint8) for record in read_list(source, settings=settings)}
    write_volume(source, slices, out, settings)


def oriented(order: tuple[int, ...], signs: tuple[int, ...]) -> np.ndarray:
    affine = np.zeros((4, 4))
    for axis, (k, sign) in enumerate(zip(order, signs, strict=True)):
        affine[k, axis] = sign * (0.5, 1.5, 3.0)[axis]
    affine[:, 3] = (11, -7, 5, 1)
    return affine


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("orientation", ["canonical", "stored"])
def test_slices_written_back_are_the_volume_they_came_from(orientation: str, axis: int, tmp_path: Path) -> None:
    settings = ReadSettings(intensity="window=127.5,255", orientation=orientation, slice_axis=axis)
    for number, order in enumerate(itertools.permutations(range(3))):
        source = volume_file(tmp_path, oriented(order, ((1, 1, 1), (-1, 1, -1), (1, -1, -1))[number % 3]), name=f"{number}.nii")
        copy_by_slices(source, tmp_path / "out" / f"{number}.nii", settings)
        before, after = nibabel.load(source), nibabel.load(tmp_path / "out" / f"{number}.nii")
        assert np.array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))
        assert np.allclose(after.affine, before.affine)
        assert after.header.get_zooms() == before.header.get_zooms()


@pytest.mark.parametrize("shape", [(5, 6, 4, 3), (5, 6, 7, 1), (5, 6)])
def test_shapes_with_time_or_few_axes_are_kept(shape: tuple[int, ...], tmp_path: Path) -> None:
    source = volume_file(tmp_path, np.diag([-1.0, -1.0, 2.0, 1.0]), shape)
    copy_by_slices(source, tmp_path / "out.nii.gz", ReadSettings(intensity="window=127.5,255"))
    before, after = nibabel.load(source), nibabel.load(tmp_path / "out.nii.gz")
    assert after.shape == before.shape == shape
    assert np.array_equal(np.asanyarray(after.dataobj), np.asanyarray(before.dataobj))


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1), (2, 1)])
def test_affine_and_its_codes_are_those_of_the_source(codes: tuple[int, int], tmp_path: Path) -> None:
    source = volume_file(tmp_path, oriented((0, 1, 2), (-1, -1, 1)))
    image = nibabel.load(source)
    image.set_sform(image.affine, codes[0])
    image.set_qform(image.affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "w.nii.gz")
    copy_by_slices(tmp_path / "w.nii.gz", tmp_path / "out.nii.gz", ReadSettings(intensity="minmax"))
    before, after = nibabel.load(tmp_path / "w.nii.gz"), nibabel.load(tmp_path / "out.nii.gz")
    assert np.allclose(after.affine, before.affine)
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == codes
    assert after.header.get_xyzt_units() == ("mm", "sec")


def test_no_text_of_the_source_is_written(tmp_path: Path) -> None:
    copy_by_slices(volume_file(tmp_path, np.eye(4), name="v.nii"), tmp_path / "out.nii", ReadSettings())
    assert b"SMITH" in (tmp_path / "v.nii").read_bytes()
    assert b"SMITH" not in (tmp_path / "out.nii").read_bytes()


def test_slices_that_are_not_given_are_zero_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    source = volume_file(tmp_path, np.eye(4))
    write_volume(source, {"z3": np.full((6, 5), 9, np.uint8)}, tmp_path / "out.nii.gz")
    values = np.asanyarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    assert (values[:, :, 3] == 9).all()
    assert values.sum() == 9 * 30
    for slices, words in (({}, "at least one"), ({"z7": np.zeros((6, 5))}, "lie in the volume"), ({"f1": np.zeros((6, 5))}, "lie in the volume"),
                          ({"z0": np.zeros((5, 6))}, "size of the stored slice")):
        with pytest.raises(DataError, match=words):
            write_volume(source, slices, tmp_path / "never.nii.gz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.nii.gz", "v.nii.gz"]
