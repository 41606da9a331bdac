"""Cross-fitted regions: nothing of a patient reaches the localizer that maps its images, and nothing of val and test masks any of them."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; drawn_regions.py is shared
from drawn_regions import write_set

from mwm.data import DataError, ReadSettings, Record, open_regions, read_image, read_list
from mwm.localize import RefineSettings
from mwm.study import crossfit
from mwm.study.crossfit import _refined, crossfit_regions, patient_parts
from mwm.study.crossfit_train import SIZE, FitSettings, standard_image, standard_mask, view

QUICK = FitSettings(steps=2, batch=4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def regions_of(folder: Path, index: Path) -> dict[str, torch.Tensor]:
    store = open_regions(folder)
    return {r.name: store.region(r, ReadSettings()) for r in read_list(index) if store.has(r)}


def edit(index: Path, change: object) -> None:
    with index.open() as stream:
        rows = list(csv.DictReader(stream))
    rows = [dict(row) for row in rows]
    for row in rows:
        change(row)
    with index.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_no_image_is_mapped_by_a_localizer_that_saw_its_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_set(tmp_path, patients=20)
    patient, split = {}, {}
    for record in read_list(index):
        pixels = standard_image(read_image(record)).numpy().tobytes()
        patient[pixels], split[pixels] = record.patient, record.split
    mapped: Counter[bytes] = Counter()

    def fit(images: torch.Tensor, masks: torch.Tensor, prompt: str, settings: FitSettings, seed: int) -> set[str]:
        rows = [image.numpy().tobytes() for image in images]
        assert {split[row] for row in rows} == {"train"} and prompt == "brain tumour"
        assert bool((masks.flatten(1).amax(1) == 255).all())
        return {patient[row] for row in rows}

    def heat(seen: set[str], images: torch.Tensor, prompt: str, settings: FitSettings) -> torch.Tensor:
        for image in images:
            pixels = image.numpy().tobytes()
            assert patient[pixels] not in seen
            mapped[pixels] += 1
        return torch.full(images.shape, 0.6)

    monkeypatch.setattr(crossfit, "fit_localizer", fit)
    monkeypatch.setattr(crossfit, "heat_maps", heat)
    crossfit_regions(index, tmp_path / "out", "brain tumour", parts=3)
    assert {split[p] for p in mapped} == {"train", "val"}
    assert all(times == (1 if split[p] == "train" else 3) for p, times in mapped.items())  # the mean of all three for val


def test_masks_of_val_and_everything_of_test_are_not_needed(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    for record in read_list(index):
        if record.split != "train":
            record.mask.unlink()
        if record.split == "test":
            record.path.unlink()
    report = crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=QUICK, device="cpu")
    found = regions_of(tmp_path / "out", index)
    assert sorted(found) == sorted(r.name for r in read_list(index) if r.split != "test")
    assert report.images == report.facts["images"] == sum(r.split == "train" for r in read_list(index))
    assert all(region.shape == (48, 40) for region in found.values())


def test_localizers_learn_and_the_second_call_finds_everything_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = write_set(tmp_path)
    report = crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=FitSettings(steps=45, batch=6), device="cpu")
    assert report.dice > 0.8 and "supervised region source" in str(report)
    meta = json.loads((tmp_path / "out" / "regions.json").read_text())["meta"]
    assert meta["source"]["kind"] == "supervised region source" and meta["source"]["cross-fitted"] and meta["source"]["parts"] == 2
    assert meta["localizer"].startswith("crossfit v") and "p00" not in json.dumps(meta)
    monkeypatch.setattr(crossfit, "fit_localizer", None)
    again = crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=FitSettings(steps=45, batch=6), device="cpu")
    assert again.dice == report.dice and again.facts == report.facts
    with pytest.raises(DataError, match="got those of others"):
        crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=QUICK)


def test_same_seed_same_regions_and_another_seed_others(tmp_path: Path) -> None:
    index = write_set(tmp_path, patients=10, images=1)
    soft = crossfit.RefineSettings(threshold=0.0, soft=True)
    one, two, other = (crossfit_regions(index, tmp_path / name, "brain tumour", parts=2, settings=QUICK, seed=seed, refinement=soft, device="cpu")
                       for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    first, second, third = (regions_of(report.out, index) for report in (one, two, other))
    assert all(torch.equal(first[name], second[name]) for name in first) and one.facts == two.facts
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_views_move_image_and_mask_together_and_depend_on_the_seed_alone() -> None:
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    disc = ((rows - 50) ** 2 + (columns - 80) ** 2 < 20**2).float()
    images, masks = standard_image(0.1 + 0.8 * disc[None])[None].expand(8, -1, -1), standard_mask(disc)[None].expand(8, -1, -1)
    x, y = view(images, masks, FitSettings(), torch.Generator().manual_seed(0))
    assert x.shape == (8, 1, SIZE, SIZE) and y.shape == (8, SIZE, SIZE) and float(x.min()) >= 0 and float(x.max()) <= 1
    for one, truth in zip(x[:, 0], y, strict=True):
        assert float(one[truth > 0].mean()) > float(one[truth == 0].mean()) + 0.3
    assert not torch.equal(y[0], y[1])
    again = view(images, masks, FitSettings(), torch.Generator().manual_seed(0))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    centre = (view(images, masks, FitSettings(mirror=False), torch.Generator().manual_seed(k))[1] * columns for k in range(8))
    assert all(float(c.sum() / (c > 0).sum().clamp(min=1)) > 64 for c in centre)  # no flip where a prompt tells sides


def rows(patients: dict[str, tuple[str, int]]) -> list[Record]:
    return [Record(Path("x"), f"{p}/{k}", 0, split="train", label=label, patient=p) for p, (label, n) in patients.items() for k in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_parts_share_classes_and_do_not_depend_on_order(seed: int) -> None:
    listed = rows({f"{label}{k}": (label, 1 + (5 * k) % 7) for label in "abc" for k in range(9)})
    parts = patient_parts(listed, 3, seed)
    assert parts == patient_parts(listed[::-1], 3, seed)
    for label in "abc":
        counts = Counter(parts[r.patient] for r in listed if r.label == label)
        assert len(counts) == 3 and max(counts.values()) - min(counts.values()) <= 7
    assert len({json.dumps(patient_parts(listed, 3, s)) for s in range(6)}) > 1


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (lambda row: row.update(patient=""), {}, "must name its patient"),
        (lambda row: row.update(patient="one" if row["split"] == "train" else "two"), {}, "as many patients as parts, got 1"),
        (lambda row: row.update(patient="p00" if row["split"] == "val" else row["patient"]), {}, "each patient must be in one split"),
        (lambda row: row.update(mask=""), {}, "training rows must have masks"),
        (lambda row: None, {"parts": 1}, "parts must be a whole number of at least 2"),
        (lambda row: None, {"others": ("val", "test")}, "must leave out test"),
        (lambda row: None, {"prompt": "left ventricle"}, "outside its vocabulary"),
    ],
)
def test_what_cannot_be_cross_fitted_is_refused_in_one_sentence(tmp_path: Path, change: object, options: dict, sentence: str) -> None:
    index = write_set(tmp_path)
    edit(index, change)
    with pytest.raises(ValueError, match=sentence) as caught:
        crossfit_regions(index, tmp_path / "out", **{"prompt": "brain tumour", "parts": 3, **options})
    assert "\n" not in str(caught.value) and "p00" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unlabelled_image_of_a_training_patient_is_mapped_by_the_localizer_that_never_saw_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`write_folds` makes such rows; they had been refused as a patient in two splits, in every fold and for ever."""
    index = write_set(tmp_path, patients=20)
    edit(index, lambda row: row.update(split="unlabelled", label="", mask="") if row["split"] == "train" and row["file"].endswith("_2.png") else None)
    patient = {standard_image(read_image(record)).numpy().tobytes(): record.patient for record in read_list(index)}
    taught: dict[int, set[str]] = {}
    mapped: dict[bytes, list[int]] = {}

    def fit(images: torch.Tensor, masks: torch.Tensor, prompt: str, settings: FitSettings, seed: int) -> int:
        taught[seed] = {patient[image.numpy().tobytes()] for image in images}
        return seed

    def maps(model: int, images: torch.Tensor, prompt: str, settings: FitSettings) -> torch.Tensor:
        for image in images:
            mapped.setdefault(image.numpy().tobytes(), []).append(model)
        return torch.zeros(images.shape)

    monkeypatch.setattr(crossfit, "fit_localizer", fit)
    monkeypatch.setattr(crossfit, "heat_maps", maps)
    crossfit_regions(index, tmp_path / "out", "brain tumour", parts=3, settings=QUICK, others=("unlabelled",))
    unlabelled = [standard_image(read_image(record)).numpy().tobytes() for record in read_list(index) if record.split == "unlabelled"]
    assert len(unlabelled) == 12 and all(len(mapped[image]) == 1 and patient[image] not in taught[mapped[image][0]] for image in unlabelled)


def test_an_image_that_cannot_be_read_is_left_out_and_changes_no_other_map(tmp_path: Path) -> None:
    """One damaged file had ended the regions of every fold that trains on it."""
    index = write_set(tmp_path)
    damaged = next(record for record in read_list(index) if record.split == "train" and record.name.endswith("_1.png"))
    damaged.path.write_bytes(b"no picture")
    made = crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=QUICK)
    assert made.facts["unreadable"] == [damaged.name] and set(regions_of(tmp_path / "out", index)) == {r.name for r in read_list(index) if r.split != "test"} - {damaged.name}
    again = crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=QUICK)
    assert again.facts == made.facts and again.seconds < 1
    edit(index, lambda row: row.update(split="test" if row["file"] == damaged.name else row["split"], patient="nobody" if row["file"] == damaged.name else row["patient"]))
    without = crossfit_regions(index, tmp_path / "without", "brain tumour", parts=2, settings=QUICK)
    assert without.dice == made.dice and "unreadable" not in without.facts


def test_masks_of_nothing_are_refused_and_other_files_kept(tmp_path: Path) -> None:
    index = write_set(tmp_path)
    with pytest.raises(DataError, match="holds other files"):
        crossfit_regions(index, tmp_path / "images", "brain tumour", parts=2, settings=QUICK)
    for path in (tmp_path / "masks").iterdir():
        Image.new("L", (40, 48)).save(path)
    with pytest.raises(DataError, match="must show something"):
        crossfit_regions(index, tmp_path / "out", "brain tumour", parts=2, settings=QUICK)


def test_regions_of_before_stay_those_of_the_same_settings() -> None:
    """Refinements that came later are in the hash only where they are used."""
    assert set(_refined(RefineSettings())) == {"method", "threshold", "min_peak", "min_area", "components", "expand", "soft"}
    assert _refined(RefineSettings(blur=0.02))["blur"] == 0.02 and _refined(RefineSettings(crf=True))["crf"] is True
