"""Region and foreground of one image take the same way as the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mwm.data import DataError, ImageList, JointTransform, MissingRegion, PretrainDataset, ReadSettings, collate, read_list

SIZE = ReadSettings(size=(16, 16))


@pytest.fixture
def scans(tmp_path: Path, png) -> ImageList:
    """Four images in scans/, bright halves as masks in masks/, all that is not black in bodies/."""
    random = np.random.default_rng(0)
    for k in range(4):
        image = random.integers(0, 256, (20 + 3 * k, 30 - 2 * k)).astype(np.uint8)
        image[:4] = 0
        png(f"scans/{k}.png", image)
        png(f"masks/{k}_mask.png", ((image > 127) * 255).astype(np.uint8))
        png(f"bodies/{k}.png", ((image > 0) * 255).astype(np.uint8))
    return read_list(tmp_path / "scans")


def test_two_maps_are_those_of_two_data_sets_with_one(scans: ImageList, tmp_path: Path) -> None:
    views = {"settings": SIZE, "transform": JointTransform(12, (0.4, 1.0)), "seed": 5}
    both = PretrainDataset(scans, regions=tmp_path / "masks", foreground=tmp_path / "bodies", **views)
    one, other = (PretrainDataset(scans, regions=tmp_path / name, **views) for name in ("masks", "bodies"))
    for epoch in range(3):
        for k in range(4):
            item = both[epoch, k]
            assert item["region"].shape == (2, 12, 12) and item["region"].is_contiguous()
            assert torch.equal(item["region"], torch.stack([one[epoch, k]["region"], other[epoch, k]["region"]]))
            assert torch.equal(item["image"], one[epoch, k]["image"])
    assert collate([both[k] for k in range(4)])["region"].shape == (4, 2, 12, 12)
    assert not PretrainDataset(scans, SIZE, foreground=tmp_path / "bodies")[0]["region"][0].any()


def test_a_foreground_that_is_missing_or_of_other_images_is_told(scans: ImageList, tmp_path: Path, png) -> None:
    (tmp_path / "bodies" / "2.png").unlink()
    data = PretrainDataset(scans, SIZE, tmp_path / "masks", foreground=tmp_path / "bodies")
    with pytest.raises(MissingRegion, match="has no region"):
        data[2]
    png("else/of_others.png", np.zeros((5, 5), np.uint8))
    with pytest.raises(DataError, match="must hold regions of these images"):
        PretrainDataset(scans, SIZE, tmp_path / "masks", foreground=tmp_path / "else")
