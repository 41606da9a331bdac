"""Images, boxes and masks move together, and what is found goes back to the very pixels it came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from mwm.data import ReadSettings, Record
from mwm.train.export import Preprocessing
from mwm.transfer.augment import Augment
from mwm.transfer.coco import decode, encode
from mwm.transfer.detect_images import SceneBatches, coco_results, read_scenes, rle_masks
from mwm.transfer.detect_objects import Objects, extent
from mwm.transfer.labelled import Case
from mwm.transfer.placing import placing

pytest.importorskip("pycocotools")


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width] + 0.5
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


def scenes_of(tmp_path: Path, aspect: str, masks: list[np.ndarray], size: tuple[int, int] = (64, 64)):
    """One bright object per image on black, so that the picture itself says where the object is."""
    cases, objects = [], {}
    for k, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{k}.png")
        cases.append(Case(Record(tmp_path / f"{k}.png", f"{k}.png", k), -1, "p", "train"))
        objects[f"{k}.png"] = Objects(mask.shape, ("a",), extent(mask)[None], (encode(mask),), (False,))
    preprocessing = Preprocessing(size, 1, (0.0,), (1.0,), ReadSettings(aspect=aspect).to_dict())
    return read_scenes(cases, lambda case, stored: objects[case.record.name], preprocessing)[0], preprocessing


@pytest.mark.parametrize("aspect", ["pad", "stretch", "crop"])
def test_masks_and_boxes_lie_on_the_pixels_of_their_object(aspect: str, tmp_path: Path) -> None:
    scenes, _ = scenes_of(tmp_path, aspect, [disc(120, 90, 55, 40, 20), disc(90, 120, 40, 60, 12)])
    for scene in scenes.values():
        bright = scene.image[0].numpy() > 32767 // 2
        mask = scene.masks[0].numpy().astype(bool)
        assert (bright != mask).mean() < 0.002
        np.testing.assert_allclose(scene.boxes[0].numpy(), extent(mask), atol=1.01)


def test_crops_and_flips_move_image_box_and_mask_alike(tmp_path: Path) -> None:
    scenes, preprocessing = scenes_of(tmp_path, "stretch", [disc(64, 64, 20 + k, 24, 9) for k in range(6)])
    batches = SceneBatches(list(scenes.values()), ["a"], preprocessing, torch.device("cpu"), masks=True)
    places = []
    for epoch in range(8):
        images, targets = batches.batch(range(6), Augment(0.5, True, 0), epoch)
        for image, target in zip(images, targets, strict=True):
            if len(target["boxes"]):
                mask = target["masks"][0].numpy().astype(bool)
                assert ((image[0].numpy() > 0.5) != mask).mean() < 0.01
                np.testing.assert_allclose(target["boxes"][0].numpy(), extent(mask), atol=1.6)
                places.append(target["boxes"][0].tolist())
    assert np.std([place[0] for place in places]) > 3  # they do move
    again = batches.batch(range(6), Augment(0.5, True, 0), 7)
    assert torch.equal(images, again[0])


def test_object_that_a_crop_hardly_shows_is_no_target_and_a_negative_has_none(tmp_path: Path) -> None:
    scenes, preprocessing = scenes_of(tmp_path, "stretch", [disc(64, 64, 5, 5, 4), disc(64, 64, 32, 32, 8)])
    batches = SceneBatches(list(scenes.values()), ["a"], preprocessing, torch.device("cpu"), masks=True)
    found = [batches.batch([0, 1], Augment(0.3, False, 0), epoch)[1] for epoch in range(12)]
    corner = [len(targets[0]["boxes"]) for targets in found]
    assert set(corner) == {0, 1}
    for targets in found:
        for target in targets:
            assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
            assert target["masks"].shape[1:] == (64, 64)


@pytest.mark.parametrize(("aspect", "stored"), [("pad", (96, 64)), ("stretch", (50, 80)), ("crop", (70, 64))])
def test_mask_cut_out_as_in_training_comes_back_to_its_pixels(aspect: str, stored: tuple[int, int]) -> None:
    """Without the half pixel of roi_align the overlaps are 0.85, 0.90 and 0.926."""
    settings = ReadSettings(aspect=aspect, size=(64, 64))
    place = placing(stored, settings)
    mask = disc(*stored, stored[0] * 0.5, stored[1] * 0.45, 7)
    box = torch.from_numpy(place.to_model(extent(mask)[None])).float()
    # The true disc on the network's pixels, drawn and not resampled.
    rows, columns = np.mgrid[:64, :64] + 0.5
    y, x = (rows - place.offset[0]) / place.scale[0], (columns - place.offset[1]) / place.scale[1]
    seen = torch.from_numpy(((y - stored[0] * 0.5) ** 2 + (x - stored[1] * 0.45) ** 2 < 49).astype(np.float32))[None]
    cut = project_masks_on_boxes(seen, box, torch.zeros(1, dtype=torch.int64), 28)
    (rle,) = rle_masks(cut, box, place)
    back = decode(rle)
    assert back.shape == stored
    assert (back & mask).sum() / (back | mask).sum() > 0.928


def test_results_are_in_stored_pixels_best_first() -> None:
    place = placing((128, 128), ReadSettings(size=(64, 64)))
    found = {"boxes": torch.tensor([[0.0, 0, 8, 8], [16, 16, 40, 48]]), "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.2, 0.9]), "masks": torch.ones(2, 1, 28, 28)}
    first, second = coco_results(found, place, 5)
    assert (first["image_id"], first["category_id"], first["score"], first["bbox"]) == (5, 2, 0.9, [32, 32, 48, 64])
    assert abs(int(decode(first["segmentation"]).sum()) - 48 * 64) < 300
    assert second["bbox"] == [0, 0, 16, 16]
    assert "segmentation" not in coco_results({k: v for k, v in found.items() if k != "masks"}, place, 1)[0]
    assert coco_results({k: v[:0] for k, v in found.items()}, place, 1) == []


def test_object_smaller_than_a_pixel_of_the_network_keeps_a_pixel_or_is_left_out(tmp_path: Path) -> None:
    mask = np.zeros((256, 256), bool)
    mask[100:106, 100:106] = True
    scenes, _ = scenes_of(tmp_path, "stretch", [mask])
    assert scenes["0.png"].masks.sum() >= 1
    mask[:] = False
    mask[100, 100] = True
    scenes, _ = scenes_of(tmp_path, "stretch", [mask])
    assert len(scenes["0.png"].boxes) == 0
    assert len(scenes["0.png"].objects.boxes) == 1
