"""Whole folders: cached by content, resumable, nameless, with one sentence for each thing that goes wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mwm.data import DataError, PretrainDataset, ReadSettings, open_regions, read_list
from mwm.localize import RefineSettings, UnsupportedImage, localize_folder


class Bright:
    """Finds bright pixels when asked for "bright", dark ones when asked for "dark"; counts the images it is shown."""

    name = "bright"

    def __init__(self, version: int = 1, refuses: float | None = None) -> None:
        self.fingerprint, self.refuses, self.seen = f"bright {version}", refuses, 0

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        if self.refuses is not None and bool((images.amax((1, 2, 3)) >= self.refuses).any()):
            raise UnsupportedImage("bright: images must be dim, got a bright one. Use another localizer.")
        self.seen += len(images)
        grey = images.mean(1)
        return torch.stack([one if text == "bright" else 1 - one for one, text in zip(grey, prompts, strict=True)])


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    """A dark image with one bright square. uint8 [height, width]"""
    place = np.random.default_rng(seed)
    pixels = place.integers(0, 60, (height, width)).astype(np.uint8)
    top, left = place.integers(0, height - 12), place.integers(0, width - 12)
    pixels[top : top + 12, left : left + 12] = 220
    return pixels


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "Doe_Jane_1961"
    (folder / "follow-up").mkdir(parents=True)
    for index in range(7):
        where = folder / "follow-up" if index % 2 else folder
        Image.fromarray(picture(index, height=40 + 8 * (index % 2))).save(where / f"Doe_Jane_{index}.png")
    return folder


def run(images: Path, localizer: object, out: Path, prompt: str | None = "bright", **options: object) -> object:
    return localize_folder(images, prompt, localizer, out, progress=False, **options)


def test_every_image_has_its_region_at_its_own_size(scans: Path, tmp_path: Path) -> None:
    report = run(scans, Bright(), tmp_path / "regions")
    assert (report.images, report.made, report.empty, report.full, report.skipped) == (7, 7, 0, 0, 0)
    regions = open_regions(tmp_path / "regions")
    for record in read_list(scans):
        pixels = np.asarray(Image.open(record.path))
        assert np.array_equal(regions.region(record).numpy() > 0, pixels > 127)


def test_a_file_or_a_link_to_nowhere_as_out_is_refused_before_anything_is_computed(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "far")
    for name in ("file", "link"):
        localizer = Bright()
        with pytest.raises(DataError, match="localize: out must be a folder"):
            run(scans, localizer, tmp_path / name)
        assert localizer.seen == 0


def test_second_run_computes_nothing_and_gives_the_same(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions")
    before = {path: path.read_bytes() for path in (tmp_path / "regions").rglob("*") if path.is_file()}
    again = Bright()
    report = run(scans, again, tmp_path / "regions")
    assert again.seen == 0 and report.made == 0 and report.images == 7
    assert {path: path.read_bytes() for path in (tmp_path / "regions").rglob("*") if path.is_file()} == before


def test_key_is_the_content_so_renamed_images_cost_nothing_and_changed_ones_are_redone(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions")
    (scans / "Doe_Jane_0.png").rename(scans / "other.png")
    localizer = Bright()
    run(scans, localizer, tmp_path / "regions")
    assert localizer.seen == 0
    Image.fromarray(picture(99)).save(scans / "other.png")
    run(scans, localizer, tmp_path / "regions")
    assert localizer.seen == 1
    record = next(record for record in read_list(scans) if record.name == "other.png")
    assert np.array_equal(open_regions(tmp_path / "regions").region(record).numpy() > 0, picture(99) > 127)


@pytest.mark.parametrize(
    "change",
    [{"prompt": "dark"}, {"localizer": Bright(version=2)}, {"refinement": RefineSettings(threshold=0.4)}, {"read": ReadSettings(intensity="minmax")}],
    ids=["prompt", "localizer", "refinement", "reading"],
)
def test_prompt_localizer_and_settings_are_part_of_the_key(scans: Path, tmp_path: Path, change: dict) -> None:
    run(scans, Bright(), tmp_path / "regions")
    assert run(scans, **{"localizer": Bright(), "out": tmp_path / "regions", **change}).made == 7


def test_interrupted_run_goes_on_where_it_was(scans: Path, tmp_path: Path) -> None:
    class Stops(Bright):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            if self.seen >= 3:
                raise KeyboardInterrupt
            return super().__call__(images, prompts)

    with pytest.raises(KeyboardInterrupt):
        run(scans, Stops(), tmp_path / "regions", batch_size=1)
    assert run(scans, Bright(), tmp_path / "regions").made == 4


def test_damaged_cache_entry_is_made_again(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions")
    victim = sorted((tmp_path / "regions").rglob("*.region"))[0]
    victim.write_bytes(victim.read_bytes()[:-9])
    assert run(scans, Bright(), tmp_path / "regions").made == 1


def test_no_file_or_folder_name_is_written_into_the_cache(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions")
    for path in (tmp_path / "regions").rglob("*"):
        assert "Doe" not in path.name and "follow" not in path.name
        if path.is_file():
            assert b"Doe" not in path.read_bytes() and b"follow" not in path.read_bytes()


def test_prompts_of_the_index_go_before_the_common_one(scans: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in scans.glob("*.png"))
    with (scans / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "prompt"), (names[0], "dark"), *((name, "") for name in names[1:])])
    run(scans / "index.csv", Bright(), tmp_path / "regions")
    regions = open_regions(tmp_path / "regions")
    shares = [float((regions.region(record) > 0).float().mean()) for record in read_list(scans / "index.csv")]
    assert shares[0] > 0.9 and max(shares[1:]) < 0.1
    with pytest.raises(ValueError, match="got none for 3 of 4 images"):
        run(scans / "index.csv", Bright(), tmp_path / "regions", prompt=None)


def test_batches_of_mixed_sizes_equal_single_images(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "a", batch_size=1)
    run(scans, Bright(), tmp_path / "b", batch_size=64)
    one, many = open_regions(tmp_path / "a"), open_regions(tmp_path / "b")
    assert all(torch.equal(one.region(record), many.region(record)) for record in read_list(scans))


def test_regions_reach_the_training_set_in_place(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions")
    data = PretrainDataset(read_list(scans), ReadSettings(size=(64, 64)), tmp_path / "regions", None)
    for index in range(7):
        sample = data[index]
        inside = sample["region"] > 0.5
        assert sample["image"][0][inside].mean() > 0.6 and sample["image"][0][~inside].mean() < 0.3


def test_unreadable_file_is_skipped_and_listed_or_fatal(scans: Path, tmp_path: Path) -> None:
    broken = scans / "broken.png"
    broken.write_bytes((scans / "Doe_Jane_0.png").read_bytes()[:200])
    report = run(scans, Bright(), tmp_path / "regions")
    assert report.skipped == 1 and report.images == 7
    assert "broken.png" in (tmp_path / "regions" / "skipped.csv").read_text()
    assert "skipped: 1 files" in str(report)
    with pytest.raises(ValueError, match=r"broken\.png"):
        run(scans, Bright(), tmp_path / "strict", strict=True)
    broken.unlink()
    run(scans, Bright(), tmp_path / "regions")
    assert not (tmp_path / "regions" / "skipped.csv").exists()


def test_image_that_the_localizer_refuses_does_not_take_its_batch_along(scans: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 60), 255, dtype=np.uint8)).save(scans / "photo.png")
    report = run(scans, Bright(refuses=0.95), tmp_path / "regions", batch_size=64)
    assert report.images == 7 and report.skipped == 1
    assert "photo.png" in (tmp_path / "regions" / "skipped.csv").read_text()


def test_folder_of_another_kind_of_image_ends_in_the_localizers_sentence(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image has a region: bright: images must be dim") as caught:
        run(scans, Bright(refuses=0.1), tmp_path / "regions")
    assert "\n" not in str(caught.value)


def test_large_folder_of_another_kind_is_given_up_early(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for index in range(60):
        Image.fromarray(picture(index)).save(tmp_path / "scans" / f"{index}.png")
    shown = []

    class Refuses(Bright):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            shown.append(len(images))
            raise UnsupportedImage("bright: not these.")

    with pytest.raises(ValueError, match="the localizer refuses these images"):
        run(tmp_path / "scans", Refuses(), tmp_path / "regions")
    assert shown.count(1) <= 24


def test_prompt_that_matches_nothing_ends_in_one_sentence_and_keeps_what_was_made(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt 'bright' matches nothing: 7 of 7 regions are empty.*Reword") as caught:
        run(scans, Bright(), tmp_path / "regions", refinement=RefineSettings(threshold=0.99))
    assert "\n" not in str(caught.value)
    assert len(open_regions(tmp_path / "regions")) == 7


def test_map_with_nan_skips_that_image_only(scans: Path, tmp_path: Path) -> None:
    class Fails(Bright):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            heat = super().__call__(images, prompts)
            heat[0, 0, 0] = float("nan")
            return heat

    report = run(scans, Fails(), tmp_path / "regions", batch_size=4)
    assert report.skipped + report.images == 7 and report.images >= 3
    assert "NaN" in (tmp_path / "regions" / "skipped.csv").read_text()


def test_regions_that_cover_everything_are_counted_and_warned_about(scans: Path, tmp_path: Path) -> None:
    report = run(scans, Bright(), tmp_path / "regions", prompt="dark", refinement=RefineSettings(threshold=0.1))
    assert report.full == 7 and "Raise the threshold" in str(report)


def test_settings_are_stored_beside_the_regions(scans: Path, tmp_path: Path) -> None:
    run(scans, Bright(), tmp_path / "regions", refinement=RefineSettings(components=1))
    meta = open_regions(tmp_path / "regions").meta
    assert meta["prompt"] == "bright" and meta["localizer"] == "bright 1" and meta["refine"]["components"] == 1
    json.dumps(meta)


def test_folder_without_images_and_bad_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"got none|holds no|no image"):
        run(tmp_path / "empty", Bright(), tmp_path / "regions")
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path / "nowhere", Bright(), tmp_path / "regions")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        run(tmp_path / "empty", Bright(), tmp_path / "regions", batch_size=0)
    assert not (tmp_path / "regions").exists()
