"""COCO files: what is right is read exactly, what is wrong is refused in one sentence before any C code sees it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mwm.data import DataError
from mwm.transfer.coco import _runs, decode, encode, read_coco
from mwm.transfer.config import TransferError

pytest.importorskip("pycocotools")


def content(**changes) -> dict:
    """A sound file of one image of 20 x 10 pixels with one object."""
    base = {"images": [{"id": 7, "file_name": "a/one.png", "width": 20, "height": 10, "patient": "p1", "split": "train"}], "categories": [{"id": 3, "name": "lesion"}],
            "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [2, 3, 6, 4], "segmentation": [[2, 3, 8, 3, 8, 7, 2, 7]], "iscrowd": 0}]}
    return base | changes


def written(folder: Path, value: object) -> Path:
    path = folder / "data.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_sound_file_is_read_exactly(tmp_path: Path) -> None:
    (image,) = read_coco(written(tmp_path, content()), tmp_path)
    assert (image.file, image.size, image.split, image.patient, image.labels, image.crowd) == ("a/one.png", (10, 20), "train", "p1", ("lesion",), (False,))
    np.testing.assert_array_equal(image.boxes, [[2, 3, 8, 7]])
    mask = np.zeros((10, 20), bool)
    mask[3:7, 2:8] = True
    np.testing.assert_array_equal(decode(image.masks[0]), mask)


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((37, 53)) < rng.uniform(0.02, 0.98)
    runs, value, expected = mask.ravel(order="F"), False, [0]
    for pixel in runs:
        if pixel != value:
            expected.append(0)
            value = pixel
        expected[-1] += 1
    assert _runs(encode(mask)["counts"]) == expected
    np.testing.assert_array_equal(decode(encode(mask)), mask)


def test_plain_and_compressed_run_lengths_give_the_same_mask(tmp_path: Path) -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:9] = True
    packed = encode(mask)
    for counts in (packed["counts"], _runs(packed["counts"])):
        one = content()
        one["annotations"][0]["segmentation"] = {"size": [10, 20], "counts": counts}
        np.testing.assert_array_equal(decode(read_coco(written(tmp_path, one), tmp_path)[0].masks[0]), mask)


def annotation(**changes) -> dict:
    one = content()
    one["annotations"][0] |= changes
    return one


def image(**changes) -> dict:
    one = content()
    one["images"][0] |= changes
    return one


@pytest.mark.parametrize(("value", "words"), [
    ("not json", "must be JSON"), ("[1, 2]", "must be a COCO file"), ({"images": []}, "none named annotations"), ("[" * 100_000, "must be JSON"),
    (json.dumps(content()).replace('"bbox": [2', '"bbox": [NaN'), "finite numbers, got NaN"),
    (annotation(bbox=[1, 2, 3]), "bbox must be four finite numbers"), (annotation(bbox=[1, 2, "3", 4]), "bbox must be four"),
    (annotation(bbox=[1, 2, 1e400, 4]), "finite numbers, got Infinity"), (annotation(bbox=[True, 2, 3, 4]), "bbox must be four"),
    (annotation(bbox=[10**400, 2, 3, 4]), "bbox must be four"), (json.dumps(content()).replace('"bbox": [2', '"bbox": [' + "9" * 5000), "must be JSON"),
    (annotation(image_id=[7]), "image_id"), (annotation(category_id={"a": 1}), "category_id"), (annotation(segmentation={"size": 5, "counts": [200]}), "of the image's 10 x 20"),
    (annotation(image_id=8), "image_id 8"), (annotation(category_id=1), "category_id 1"), (annotation(id=None), "must have an id"),
    (content(images=content()["images"] * 2), "ids of images .* each occur once, got 7 twice"),
    (content(annotations=content()["annotations"] * 2), "ids of annotations"), (content(categories=content()["categories"] * 2), "ids of categories"),
    (content(categories=[{"id": 3, "name": ""}]), "categories .* must have names"),
    (content(images=[*content()["images"], {"id": 8, "file_name": "a/one.png", "width": 20, "height": 10}]), "other files each"),
    (image(width=0), "width and height"), (image(width=10**9), "width and height"), (image(height="10"), "width and height"), (image(file_name=""), "file_name must be"),
    (annotation(segmentation=[[1, 2, 3, 4]]), "at least three finite points"), (annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "at least three"),
    (annotation(segmentation={"size": [5, 5], "counts": [25]}), "of the image's 10 x 20"),
    (annotation(segmentation={"size": [10, 20], "counts": [100, 50]}), "add up to 10 x 20"),
    (annotation(segmentation={"size": [10, 20], "counts": [300, -100]}), "add up to"),
    (annotation(segmentation={"size": [10, 20], "counts": "~~~~"}), "add up to"),
    (annotation(segmentation={"size": [10, 20], "counts": "o" * 50}), "add up to"),
])
def test_bad_file_is_refused_in_one_sentence(value: object, words: str, tmp_path: Path) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(TransferError, match=words) as caught:
        read_coco(written(tmp_path, text), tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x.png", "C:\\x.png"])
def test_file_names_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="paths must"):
        read_coco(written(tmp_path, image(file_name=name)), tmp_path)


def test_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    inner = tmp_path / "images"
    inner.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (inner / "one.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError):
        read_coco(written(tmp_path, image(file_name="one.png")), inner)


def test_polygon_beyond_the_image_is_cut(tmp_path: Path) -> None:
    (found,) = read_coco(written(tmp_path, annotation(segmentation=[[10, 5, 1e12, 5, 1e12, 1e12, 10, 1e12]])), tmp_path)
    mask = decode(found.masks[0])
    assert mask[6:, 11:].all()
    assert not mask[:4].any()
