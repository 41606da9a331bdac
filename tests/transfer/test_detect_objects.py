"""Objects out of boxes and masks: components as the boxes of the data name them, and every wrong box in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mwm.data import ReadSettings, Record
from mwm.transfer.coco import decode, encode
from mwm.transfer.config import TransferError
from mwm.transfer.detect_objects import Objects, check_boxes, coco_truth, components, extent, instances, objects_of_case
from mwm.transfer.labelled import Case

pytest.importorskip("pycocotools")


def blank() -> np.ndarray:
    return np.zeros((40, 60), bool)


def test_pixels_that_touch_at_a_corner_are_one_object_and_order_is_by_rows() -> None:
    mask = blank()
    mask[20:24, 2:6] = mask[24:28, 6:10] = True  # diagonal neighbours
    mask[3:6, 40:44] = True
    first, second = components(mask)
    np.testing.assert_array_equal(extent(first), [40, 3, 44, 6])
    np.testing.assert_array_equal(extent(second), [2, 20, 10, 28])


def test_each_box_gets_its_own_component_also_when_one_lies_in_the_extent_of_the_other() -> None:
    mask = blank()
    mask[2:38, 2:5] = mask[2:5, 2:50] = True  # an L around the small one
    mask[20:26, 20:26] = True
    large, small = instances(mask, np.array([[2.0, 2, 50, 38], [20, 20, 26, 26]]))
    assert small.sum() == 36
    assert not large[20:26, 20:26].any()
    assert large.sum() + small.sum() == mask.sum()


def test_fallen_apart_object_is_joined_and_a_speck_without_a_box_is_left_out() -> None:
    mask = blank()
    mask[10:20, 10:20] = mask[22:26, 10:20] = True  # one object of the list, in two parts
    mask[35, 55] = True
    (found,) = instances(mask, np.array([[10.0, 10, 20, 26]]))
    assert found.sum() == 140
    assert not found[35, 55]


def test_box_without_a_component_takes_the_pixels_inside_it() -> None:
    mask = blank()
    mask[5:35, 5:55] = True
    left, right = instances(mask, np.array([[5.0, 5, 30, 35], [30.5, 5, 55, 35]]))
    assert left.any()
    assert right[:, 31:55].any()


def case(tmp_path: Path, boxes: list[dict] | None, mask: np.ndarray | None) -> Case:
    if mask is not None:
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")
    record = Record(tmp_path / "i.png", "i.png", 0)
    return Case(record, 0, "p", "train", None if mask is None else tmp_path / "m.png", boxes)


def test_mask_without_boxes_gives_one_object_per_component(tmp_path: Path) -> None:
    mask = blank()
    mask[2:8, 2:8] = mask[20:30, 30:50] = True
    found = objects_of_case(case(tmp_path, None, mask), (40, 60), ReadSettings(), "tumour")
    assert found.names == ("tumour", "tumour")
    np.testing.assert_array_equal(found.boxes, [[2, 2, 8, 8], [30, 20, 50, 30]])
    assert decode(found.masks[1]).sum() == 200


def test_boxes_name_the_classes_and_a_box_without_mask_pixels_is_counted(tmp_path: Path) -> None:
    mask = blank()
    mask[2:8, 2:8] = True
    boxes = [{"label": "a", "bbox_xyxy": [2, 2, 8, 8]}, {"label": "b", "bbox_xyxy": [40, 20, 50, 30]}]
    found = objects_of_case(case(tmp_path, boxes, mask), (40, 60), ReadSettings(), "tumour")
    assert (found.names, found.maskless) == (("a",), 1)
    bare = objects_of_case(case(tmp_path, boxes, None), (40, 60), ReadSettings(), "tumour")
    assert (bare.names, bare.masks) == (("a", "b"), (None, None))


@pytest.mark.parametrize(("box", "words"), [
    ([5, 5, 5, 9], "must have an area"), ([9, 5, 3, 9], "must have an area"), ([70, 5, 80, 9], "wholly outside"), ([-9, -9, -1, -1], "wholly outside"),
    ([1, 2, 3], "four finite numbers"), ([1, 2, float("nan"), 4], "four finite numbers"), ([1, 2, "3", 4], "four finite numbers"), (None, "four finite numbers"),
])
def test_bad_box_is_refused_in_one_sentence(box: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=words) as caught:
        objects_of_case(case(tmp_path, [{"label": "a", "bbox_xyxy": box}], None), (40, 60), ReadSettings(), "")
    assert str(caught.value).startswith("finetune: i.png, box 0")
    assert "\n" not in str(caught.value)


def test_box_that_reaches_out_is_cut_and_counted() -> None:
    boxes, cut = check_boxes(np.array([[-3.0, 5, 20, 50], [1, 1, 2, 2]]), (40, 60), ["a", "b"])
    np.testing.assert_array_equal(boxes, [[0, 5, 20, 40], [1, 1, 2, 2]])
    assert cut == 1


def test_truth_has_areas_of_masks_where_there_are_some(tmp_path: Path) -> None:
    mask = blank()
    mask[2:8, 2:8] = True
    mask[2, 2] = False
    found = objects_of_case(case(tmp_path, None, mask), (40, 60), ReadSettings(), "tumour")
    truth = coco_truth([found], ["i.png"], ["tumour"], masks=True)
    assert truth["annotations"][0]["area"] == 35
    assert truth["annotations"][0]["bbox"] == [2, 2, 6, 6]
    assert coco_truth([found], ["i.png"], ["tumour"], masks=False)["annotations"][0]["area"] == 36
    assert truth["images"] == [{"id": 1, "file_name": "i.png", "width": 60, "height": 40}]


def test_crowd_without_a_mask_is_ignored_as_its_box() -> None:
    from mwm.transfer.coco_metrics import figures, match

    mask = blank()
    mask[2:8, 2:8] = True
    found = Objects((40, 60), ("a", "a"), np.array([[2.0, 2, 8, 8], [20, 10, 50, 30]]), (encode(mask), None), (False, True))
    truth = coco_truth([found], ["i.png"], ["a"], masks=True)
    inside = blank()
    inside[12:20, 25:40] = True
    results = [{"image_id": 1, "category_id": 1, "score": score, "segmentation": encode(part), "bbox": [0, 0, 1, 1]} for score, part in ((0.9, inside), (0.5, mask))]
    assert figures(match(truth, results, "segm"))[0] == pytest.approx(1.0)


def test_class_of_crowds_alone_is_left_out_of_the_truth() -> None:
    boxes = np.array([[0.0, 0, 4, 4], [5, 5, 9, 9]])
    found = Objects((10, 10), ("crowd of cells", "cell"), boxes, (None, None), (True, False))
    truth = coco_truth([found], ["i.png"], ["cell"], masks=False)
    assert [(row["id"], row["category_id"], row["iscrowd"]) for row in truth["annotations"]] == [(1, 1, 0)]
