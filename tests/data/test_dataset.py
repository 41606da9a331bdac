"""The data set: stateless items, aligned regions, caches that change nothing."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import ramp
from torch.utils.data import DataLoader

from mwm.data import DataError, EpochSampler, ImageList, JointTransform, MissingRegion, PretrainDataset, ReadSettings, RegionCache, collate, image_statistics, read_image, read_list
from mwm.data.ram import RamCache


@pytest.fixture
def scans(tmp_path: Path, png) -> ImageList:
    """Five images of different shapes in scans/, and for each a mask of its bright half in masks/."""
    random = np.random.default_rng(0)
    for k in range(5):
        image = random.integers(0, 256, (20 + 3 * k, 30 - 2 * k)).astype(np.uint8)
        png(f"scans/{k}.png", image)
        png(f"masks/{k}_mask.png", ((image > 127) * 255).astype(np.uint8))
    return read_list(tmp_path / "scans")


SIZE = ReadSettings(size=(16, 16))


def test_items_have_image_region_id_and_index(scans: ImageList) -> None:
    item = PretrainDataset(scans, SIZE)[2]
    assert item["image"].shape == (1, 16, 16) and item["image"].dtype == torch.float32
    assert item["region"].shape == (16, 16) and not item["region"].any()
    assert (item["id"], item["index"]) == (scans[2].id, 2)


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_masks_go_through_the_same_steps_as_images(tmp_path: Path, scans: ImageList, png, aspect: str) -> None:
    for k in range(5):
        image = (read_image(scans[k])[0].numpy() * 255).round().astype(np.uint8)
        image[0, 0] = 255  # a mask that reaches 255 is soft: value / 255
        png(f"scans/{k}.png", image)
        png(f"same/{k}.png", image)
    data = PretrainDataset(scans, ReadSettings(size=(24, 16), aspect=aspect), tmp_path / "same", JointTransform((24, 16), (0.3, 1.0)))
    for k in range(5):
        item = data[3, k]
        assert torch.allclose(item["image"][0], item["region"], atol=1e-4)


def test_a_pair_of_epoch_and_index_is_a_pure_key(scans: ImageList) -> None:
    data = PretrainDataset(scans, SIZE, None, JointTransform(16, (0.3, 0.8)), seed=4)
    first = data[7, 1]["image"]
    data[8, 1], data[7, 2]
    assert torch.equal(first, data[7, 1]["image"]) and not torch.equal(first, data[8, 1]["image"])
    assert not torch.equal(first, PretrainDataset(scans, SIZE, None, JointTransform(16, (0.3, 0.8)), seed=5)[7, 1]["image"])


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_count_changes_no_batch(tmp_path: Path, scans: ImageList, context: str) -> None:
    data = PretrainDataset(scans, SIZE, tmp_path / "masks", JointTransform(16, (0.3, 0.8)), cache=tmp_path / "cache")

    def batches(workers: int) -> list[dict]:
        sampler = EpochSampler(len(scans), seed=0, epoch=3, keyed=True)
        return list(DataLoader(data, batch_size=2, sampler=sampler, collate_fn=collate, num_workers=workers, multiprocessing_context=context if workers else None))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)  # Python 3.12 on forking threads
        for one, many in zip(batches(0), batches(1 if context == "spawn" else 2), strict=True):
            assert all(torch.equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize("cache", ["ram", "disk", "folder"])
def test_caches_change_no_bit(tmp_path: Path, scans: ImageList, png, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    png("scans/0.png", ramp(40, 40, 65535).astype(np.uint16))
    plain = PretrainDataset(scans, SIZE, tmp_path / "masks")
    for _ in range(2):
        cached = PretrainDataset(scans, SIZE, tmp_path / "masks", cache=tmp_path / "own" if cache == "folder" else cache)
        for _ in range(2):
            for index in range(1, 5):
                assert torch.equal(cached[index]["image"], plain[index]["image"]) and torch.equal(cached[index]["region"], plain[index]["region"])
            with pytest.raises(DataError, match="must have the shape of its image"):
                cached[0]


def test_ram_cache_is_shared_with_forked_workers_and_follows_no_later_change(scans: ImageList, png) -> None:
    data = PretrainDataset(scans, SIZE, cache="ram", channels=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        first = [item["image"] for item in DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")]
    for k in range(5):
        png(f"scans/{k}.png", np.zeros((9, 9), np.uint8))
    assert all(torch.equal(data[k]["image"], first[k]) for k in range(5)), "this process reads what its workers decoded"
    assert not pickle.loads(pickle.dumps(data))[0]["image"].any(), "a spawned worker has its own cache"


def test_a_half_written_entry_of_the_ram_cache_counts_as_missing() -> None:
    cache = RamCache(3)
    cache.prepare((1, 4, 4))
    cache.put(1, (np.arange(16, dtype=np.uint16).reshape(1, 4, 4), (4, 5), (1.0, 2.0)))
    values, stored, spacing = cache.get(1)
    assert values.sum() == 120 and (stored, spacing) == ((4, 5), (1.0, 2.0)) and cache.get(0) is None
    cache._values[1, 0, 2] = 7
    assert cache.get(1) is None


def test_a_ram_cache_beyond_the_memory_is_refused_in_one_sentence(scans: ImageList) -> None:
    with pytest.raises(DataError, match=r"ram must hold 5 images .* Use disk"):
        PretrainDataset(scans, ReadSettings(size=(8192, 8192)), cache="ram", channels=100_000)


def test_disk_cache_is_used_follows_content_and_survives_damage(tmp_path: Path, scans: ImageList, png) -> None:
    folder = tmp_path / "cache"
    first = PretrainDataset(scans, SIZE, cache=folder)[0]["image"]
    files = sorted(folder.rglob("*.image"))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:-3])
    assert torch.equal(PretrainDataset(scans, SIZE, cache=folder)[0]["image"], first), "a damaged entry is decoded again"
    png("scans/0.png", np.zeros((20, 30), np.uint8))
    assert not PretrainDataset(scans, SIZE, cache=folder)[0]["image"].any(), "another content is another entry"
    PretrainDataset(scans, ReadSettings(size=(8, 8)), cache=folder)[0]
    assert len(list(folder.rglob("*.image"))) == 3


def test_caches_hold_no_names(tmp_path: Path, png) -> None:
    png("Doe_Jane_1970/scan of Jane Doe.png", ramp().astype(np.uint8))
    records = read_list(tmp_path / "Doe_Jane_1970")
    PretrainDataset(records, SIZE, cache=tmp_path / "cache")[0]
    cache = RegionCache(tmp_path / "regions")
    cache.put(key := cache.key("x"), torch.ones(6, 8))
    cache.assign(records[0].id, key)
    cache.save()
    for path in [*(tmp_path / "cache").rglob("*"), *(tmp_path / "regions").rglob("*")]:
        assert "Doe" not in path.name and "Jane" not in path.name
        assert path.is_dir() or (b"Doe" not in path.read_bytes() and b"Jane" not in path.read_bytes())


def test_image_statistics_are_exact_and_do_not_depend_on_order(scans: ImageList) -> None:
    data = PretrainDataset(scans, SIZE)
    pixels = torch.stack([data[k]["image"] for k in range(5)]).double()
    mean, std = image_statistics(data)
    assert mean[0] == pytest.approx(pixels.mean().item(), abs=1e-9) and std[0] == pytest.approx(pixels.std(unbiased=False).item(), abs=1e-9)
    assert image_statistics(PretrainDataset(list(scans)[::-1], SIZE)) == (mean, std) == image_statistics(data, workers=2)
    assert len(image_statistics(PretrainDataset(scans, SIZE, channels=3))[0]) == 3


def test_statistics_of_images_with_different_channels_say_what_to_do(scans: ImageList, png) -> None:
    png("scans/3.png", np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(DataError, match="same channels, got 1 and 3"):
        image_statistics(PretrainDataset(scans, SIZE))
    with pytest.raises(DataError, match="one shape"):
        collate([PretrainDataset(scans, SIZE)[k] for k in (2, 3)])


def test_an_image_without_a_region_is_told_apart_from_regions_of_other_images(tmp_path: Path, scans: ImageList, png) -> None:
    (tmp_path / "masks" / "2_mask.png").unlink()
    data = PretrainDataset(scans, SIZE, tmp_path / "masks")
    assert data[1]["region"].any()
    with pytest.raises(MissingRegion, match=r"2\.png has no region"):
        data[2]
    png("others/x.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(DataError, match="got none that belongs to one of the 5"):
        PretrainDataset(scans, SIZE, tmp_path / "others")
    with pytest.raises(DataError, match="folder of regions or masks, which is not there"):
        PretrainDataset(scans, SIZE, tmp_path / "nowhere")


def test_the_mask_column_gives_regions(tmp_path: Path, scans: ImageList) -> None:
    (tmp_path / "index.csv").write_text("file,mask\nscans/0.png,masks/0_mask.png\nscans/1.png,\n")
    data = PretrainDataset(read_list(tmp_path / "index.csv"), SIZE, "masks")
    assert data.regions is not None


def test_region_maps_in_memory_are_read_by_id(scans: ImageList) -> None:
    maps = {record.id: read_image(record)[0] for record in scans}
    item = PretrainDataset(scans, SIZE, maps)[3]
    assert torch.allclose(item["region"], item["image"][0], atol=1e-4)


def test_mask_volumes_are_sliced_like_their_image(tmp_path: Path, nifti) -> None:
    volume = np.random.default_rng(0).gamma(2, 100, (9, 10, 4)).astype(np.float32)
    turned = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nifti("scans/a.nii.gz", volume, turned)
    nifti("masks/a.nii.gz", (volume > 200).astype(np.uint8), turned)
    data = PretrainDataset(read_list(tmp_path / "scans"), ReadSettings(intensity="window=200,0.001"), tmp_path / "masks")
    for k in range(4):
        assert torch.equal(data[k]["region"] > 0.5, data[k]["image"][0] > 0.5) and data[k]["region"].any()


def test_other_settings_than_those_of_the_regions_warn(tmp_path: Path, scans: ImageList) -> None:
    cache = RegionCache(tmp_path / "regions")
    for record in scans:
        cache.put(key := cache.key(record.name), read_image(record)[0])
        cache.assign(record.id, key)
    cache.meta["read"] = ReadSettings().to_dict()
    cache.save()
    PretrainDataset(scans, SIZE, tmp_path / "regions")[0]
    with pytest.warns(UserWarning, match="intensity is 'minmax' now and was 'auto'"):
        PretrainDataset(scans, ReadSettings(intensity="minmax"), tmp_path / "regions")


def test_a_full_disk_ends_in_one_sentence(scans: ImageList, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the cache's folder should be")
    with pytest.raises(DataError, match=r"disk cache in .* cannot be written"):
        PretrainDataset(scans, SIZE, cache=tmp_path / "cache")[0]


def test_a_region_is_fitted_alike_beside_a_cached_image(tmp_path: Path, dicom) -> None:
    """135 x 320 pixels of 0.332 mm: with the spacing in float32 the region was a pixel taller than with that of the file."""
    dicom("a.dcm", np.arange(135 * 320, dtype=np.uint16).reshape(135, 320), PixelSpacing=["0.332", "0.332"])
    records, settings = read_list(tmp_path / "a.dcm"), ReadSettings(size=(224, 224))
    regions = {records[0].id: torch.ones(135, 320)}
    plain = PretrainDataset(records, settings, regions)[0]["region"]
    cached = [PretrainDataset(records, settings, regions, cache=tmp_path / "cache")[0]["region"] for _ in range(2)]
    assert torch.equal(plain, cached[0]) and torch.equal(plain, cached[1])


def test_a_volume_is_hashed_once_for_all_its_slices(tmp_path: Path, nifti, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    from mwm.data import content_digest, image

    records = read_list(nifti("a.nii", np.arange(4 * 4 * 30, dtype=np.int16).reshape(4, 4, 30)))
    opened: list[object] = []

    def counting(*arguments: object) -> object:
        opened.append(arguments[0])
        return builtins.open(*arguments)

    monkeypatch.setattr(image, "open", counting, raising=False)
    digests = [content_digest(record) for record in records]
    assert len(set(digests)) == 30 and len(opened) == 1
    assert digests[3] == hashlib.blake2b(records[3].path.read_bytes() + b"#z3", digest_size=16).hexdigest()
    records[0].path.write_bytes(records[0].path.read_bytes() + b" ")
    assert content_digest(records[3]) != digests[3], "another file under the same name"
