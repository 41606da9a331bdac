"""Masks mean what the settings say, move with their images, and are refused with one sentence where they make no sense."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_masks import masked_rows, write_rows
from PIL import Image

from mwm.data import ReadSettings, Record, read_image
from mwm.train.export import Preprocessing
from mwm.transfer import FinetuneConfig, TransferError, finetune
from mwm.transfer.augment import Augment
from mwm.transfer.labelled import Case, read_labelled
from mwm.transfer.segment_images import MaskedSet, decode_masked, to_model, to_source
from mwm.transfer.segment_masks import MaskClasses, mask_classes, read_truth, with_masks


def config(run: Path, data: Path, out: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": str(run), "data": str(data), "out": str(out), "task": "segment", "progress": False, "bootstrap": 20, "epochs": 1, "batch_size": 8,
                              "head_width": 8, "device": "cpu", "allow_leak": True} | changes))


def case_of(path: Path, mask: np.ndarray | None, label: int = 0) -> Case:
    """A case whose mask has these values."""
    where = None if mask is None else path / "mask.png"
    if where is not None:
        Image.fromarray(mask).save(where)
    return Case(Record(path / "image.png", "image.png", 1), label, "p", "train", where)


def truth_of(path: Path, mask: np.ndarray | None, classes: MaskClasses = MaskClasses(("foreground",)), **more) -> np.ndarray:  # noqa: B008
    return read_truth(case_of(path, mask, **more), classes, (4, 5), ReadSettings())


def grey(*rows: list[int]) -> np.ndarray:
    """A mask of 4 x 5 pixels whose first values are given."""
    mask = np.zeros((4, 5), np.uint8)
    for row, values in enumerate(rows):
        mask[row, : len(values)] = values
    return mask


def test_masks_of_zero_and_one_other_value_are_one_foreground(tmp_path: Path) -> None:
    for value in (255, 1, 7):
        assert truth_of(tmp_path, grey([0, value, value])).tolist() == grey([0, 1, 1]).tolist()
    assert truth_of(tmp_path, np.full((4, 5), 255, np.uint8)).all()
    assert not truth_of(tmp_path, grey()).any()
    assert not truth_of(tmp_path, None).any()


def test_soft_edges_are_cut_at_half(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40).astype(np.uint8).reshape(4, 10)
    found = read_truth(case_of(tmp_path, ramp), MaskClasses(("foreground",)), (4, 10), ReadSettings())
    assert np.array_equal(found, (ramp > 127).astype(np.uint8))


def test_named_values_and_labels_are_classes(tmp_path: Path) -> None:
    named = MaskClasses(("ground_glass", "consolidation"), (100, 200))
    assert truth_of(tmp_path, grey([100, 200, 0]), named).tolist() == grey([1, 2, 0]).tolist()
    by_label = MaskClasses(("a", "b", "c"), per_label=True)
    assert truth_of(tmp_path, grey([255]), by_label, label=2)[0, 0] == 3


def coloured(folder: Path, colours: list[tuple[int, int, int]], *, palette: bool) -> Case:
    """A mask of the numbers 0, 1, 2, … in these colours, as labelling tools save them."""
    case = case_of(folder, grey(range(len(colours))))
    with Image.open(case.mask) as numbers:
        if palette:
            picture = numbers.convert("L").copy()
            picture = Image.frombytes("P", picture.size, picture.tobytes())
            picture.putpalette([value for colour in colours for value in colour])
        else:
            picture = Image.fromarray(np.array(colours, np.uint8)[np.array(numbers)])
    picture.save(case.mask)
    return case


def test_numbers_of_a_coloured_palette_are_classes(tmp_path: Path) -> None:
    red_green = coloured(tmp_path, [(0, 0, 0), (128, 0, 0), (0, 128, 0)], palette=True)
    named = MaskClasses(("edema", "core"), (1, 2))
    assert read_truth(red_green, named, (4, 5), ReadSettings()).tolist() == grey([0, 1, 2]).tolist()
    with pytest.raises(TransferError, match="0 and one other value, got 0, 1, 2"):
        read_truth(red_green, MaskClasses(("foreground",)), (4, 5), ReadSettings())
    inverse = coloured(tmp_path, [(255, 255, 255), (0, 0, 0)], palette=True)  # grey: what is seen counts, not the numbers
    assert read_truth(inverse, MaskClasses(("foreground",)), (4, 5), ReadSettings())[0].tolist() == [1, 0, 1, 1, 1]


def test_several_colours_of_one_brightness_are_not_taken_for_one_class(tmp_path: Path) -> None:
    one = coloured(tmp_path, [(0, 0, 0), (255, 0, 0)], palette=False)
    assert read_truth(one, MaskClasses(("foreground",)), (4, 5), ReadSettings())[0].tolist() == [0, 1, 0, 0, 0]
    for palette, black in ((False, (0, 0, 0)), (True, (9, 0, 0))):
        two = coloured(tmp_path, [black, (255, 0, 0), (0, 255, 0)], palette=palette)
        with pytest.raises(TransferError, match=r"must tell their classes by numbers, got [23] colours in mask\.png"):
            read_truth(two, MaskClasses(("a",), (255,)), (4, 5), ReadSettings())


@pytest.mark.parametrize(("mask", "classes", "words"), [
    (np.zeros((5, 4), np.uint8), MaskClasses(("foreground",)), "size of their image, got mask.png with 5 x 4"),
    (np.full((4, 5), 128, np.uint8), MaskClasses(("foreground",)), "got 128 everywhere"),
    (np.full((4, 5), 1, np.uint8), MaskClasses(("foreground",)), "got 1 everywhere"),
    (grey([100, 200]), MaskClasses(("foreground",)), "0 and one other value, got 0, 100, 200"),
    (grey([100, 200]), MaskClasses(("glass",), (100,)), "named by --mask-values, got 200"),
])
def test_masks_that_make_no_sense_are_refused_in_one_sentence(mask: np.ndarray, classes: MaskClasses, words: str, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=words) as caught:
        truth_of(tmp_path, mask, classes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["100", "x=a", "0=a", "1=a,1=b", "1=a,2=a", "1=", "-1=a", ","])
def test_mask_values_must_be_pairs(text: str, tmp_path: Path) -> None:
    index = write_rows(tmp_path, masked_rows(tmp_path, patients=5, images=1))
    with pytest.raises(TransferError, match="mask_values must be different VALUE=NAME pairs"):
        mask_classes(config(tmp_path, index, tmp_path, mask_values=text), read_labelled(index, need="mask"))


def test_missing_mask_is_left_out_unless_its_label_has_nothing_to_mark(tmp_path: Path) -> None:
    rows = masked_rows(tmp_path, patients=5, images=4)
    for row in rows[1::2]:
        row["mask"] = ""  # all of label "square"
    data = read_labelled(write_rows(tmp_path, rows), need="mask")
    left = with_masks(config(tmp_path, tmp_path, tmp_path), data)
    assert len(left.cases) == 10
    assert any("10 images without a mask are left out" in note for note in left.notes)
    counted = with_masks(config(tmp_path, tmp_path, tmp_path, negatives="square"), data)
    assert len(counted.cases) == 20
    assert any("count as empty masks" in note for note in counted.notes)
    with pytest.raises(TransferError, match="negatives must be labels of DATA, got 'squares'"):
        with_masks(config(tmp_path, tmp_path, tmp_path, negatives="squares"), data)


def test_masks_of_a_folder_are_found_by_name(run: Path, tmp_path: Path) -> None:
    rows = masked_rows(tmp_path, patients=5, images=2)
    index = write_rows(tmp_path, [row | {"mask": ""} for row in rows])
    data = read_labelled(index, need="mask", masks=tmp_path / "masks")
    assert all(case.mask == tmp_path / row["mask"] for case, row in zip(data.cases, rows, strict=True))
    with pytest.raises(ValueError, match="mask"):
        finetune(config(run, index, tmp_path / "out"))


def spoil(rows: list[dict[str, str]], folder: Path, kind: str) -> list[dict[str, str]]:
    if kind == "one patient":
        return [row | {"patient": "p", "split": ""} for row in rows]
    if kind == "no masks":
        return [row | {"mask": ""} for row in rows]
    if kind == "size":
        Image.new("L", (16, 16)).save(folder / rows[0]["mask"])
    for row in rows:
        if kind in {"empty train", "empty test"} and row["split"] == kind.split()[1]:
            Image.new("L", (32, 32)).save(folder / row["mask"])
        if kind == "no test" and row["split"] == "test":
            row["mask"] = ""
    return rows


@pytest.mark.parametrize(("kind", "words"), [
    ("one patient", "patient"), ("no masks", "mask"), ("size", "masks must have the size of their image"), ("no test", "images in test, got none"),
    ("empty train", "masks of train must mark 'foreground'"), ("empty test", "masks of test must mark something"),
])
def test_data_that_cannot_teach_are_refused_in_one_sentence(kind: str, words: str, run: Path, tmp_path: Path) -> None:
    index = write_rows(tmp_path, spoil(masked_rows(tmp_path, patients=5, images=2), tmp_path, kind))
    with pytest.raises(ValueError, match=words) as caught:
        finetune(config(run, index, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_unreadable_mask_is_left_out_and_listed_or_fatal_with_strict(run: Path, tmp_path: Path) -> None:
    rows = masked_rows(tmp_path, patients=5, images=2)
    (tmp_path / rows[0]["mask"]).write_bytes(b"no image")
    index = write_rows(tmp_path, rows)
    out = finetune(config(run, index, tmp_path / "out"))
    assert "mask p00_0.png" in (out / "skipped.csv").read_text()
    with pytest.raises(ValueError, match=r"p00_0\.png"):
        finetune(config(run, index, tmp_path / "strict", strict=True))


@pytest.mark.parametrize("aspect", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("stored", [(60, 40), (17, 90), (32, 32)])
def test_masks_lie_where_their_image_lies_and_come_back(aspect: str, stored: tuple[int, int], tmp_path: Path) -> None:
    settings = ReadSettings(aspect=aspect, size=(32, 48))
    mask = np.zeros(stored, np.uint8)
    mask[stored[0] // 4 : stored[0] // 2 + 4, stored[1] // 3 : stored[1] // 2 + 6] = 1
    Image.fromarray(mask * 255).save(tmp_path / "image.png")
    as_image = read_image(tmp_path / "image.png", settings)[0].numpy() > 0.5
    placed = to_model(mask, settings, None)
    assert (placed > 0).sum() > 20
    assert ((placed > 0) != as_image).mean() < 0.02
    whole = torch.from_numpy(to_model(np.ones(stored, np.uint8), settings, None)).float()
    seen = mask * (to_source(whole[None], stored, settings, None)[0].numpy() > 0.5)  # a centre crop has cut the rest off
    back = to_source(torch.from_numpy(placed).float()[None], stored, settings, None)[0].numpy() > 0.5
    assert 2 * (back & (seen > 0)).sum() / (back.sum() + seen.sum()) > 0.85
    assert aspect == "crop" or np.array_equal(seen, mask)


def test_what_a_crop_has_cut_off_is_background() -> None:
    logits = torch.stack([torch.full((8, 8), -5.0), torch.full((8, 8), 5.0)])
    labels = to_source(logits, (8, 24), ReadSettings(aspect="crop", size=(8, 8)), None).argmax(0)
    assert labels[:, 8:16].all()
    assert not labels[:, :8].any()
    assert not labels[:, 16:].any()


def test_masks_smaller_than_a_pixel_of_the_network_are_counted(run: Path, tmp_path: Path) -> None:
    rows = masked_rows(tmp_path, patients=5, images=2, size=(96, 96))
    dot = np.zeros((96, 96), np.uint8)
    dot[0, 0] = 255
    Image.fromarray(dot).save(tmp_path / rows[0]["mask"])
    out = finetune(config(run, write_rows(tmp_path, rows), tmp_path / "out"))
    assert "1 masks mark nothing that the network's picture shows" in (out / "metrics.json").read_text()


def test_images_and_labels_move_together(tmp_path: Path) -> None:
    rows = masked_rows(tmp_path, patients=5, images=4)
    for row in rows:  # the image is its own mask
        (tmp_path / row["file"]).write_bytes((tmp_path / row["mask"]).read_bytes())
    data = read_labelled(write_rows(tmp_path, rows), need="mask")
    preprocessing = Preprocessing((32, 32), 1, (0.0,), (1.0,), {})
    decoded, _ = decode_masked(data.cases, MaskClasses(("foreground",)), preprocessing)
    masked = MaskedSet(data.cases, decoded, preprocessing, torch.device("cpu"))
    still, moving = next(masked.batches(20)), next(masked.batches(20, augment=Augment(0.4, True, 1), epoch=3))
    assert torch.equal(still[0][:, 0] > 0.5, still[1] > 0)
    assert not torch.equal(still[1], moving[1])
    assert ((moving[0][:, 0] > 0.5) == (moving[1] > 0)).float().mean() > 0.97
    assert set(moving[1].unique().tolist()) == {0, 1}
