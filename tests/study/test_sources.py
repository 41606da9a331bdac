"""What an arm changes, where its regions come from, and that it is called by its right name."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; drawn_regions.py is shared
from drawn_regions import write_set

from mwm.data import ReadSettings, open_regions, read_list
from mwm.localize.training import KEY, SUPERVISED, Training
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.sources import ARMS, Source, arm, region_fields
from mwm.train import PretrainConfig
from mwm.train.prepare import create_policy

ROOT = Path(__file__).resolve().parents[2]
CROSSFIT = Source(prompt="brain tumour", parts=2, steps=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small lose time on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.csv and 0.pretrain.csv of a drawn set, as `write_folds` makes them."""
    tmp_path = tmp_path_factory.mktemp("fold")
    index = write_set(tmp_path)
    index.rename(tmp_path / "0.csv")
    with (tmp_path / "0.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "train"]
    with (tmp_path / "0.pretrain.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for record in read_list(tmp_path / "0.csv"):
        if record.split == "test":  # no arm reads a test image or its mask
            record.path.unlink()
            record.mask.unlink()
    return tmp_path / "0.csv"


@pytest.fixture(scope="module")
def kept(fold: Path) -> Path:
    """Regions of every arm."""
    for one in ARMS.values():
        region_fields(one, CROSSFIT, fold, fold.parent / "regions", seed=0, device="cpu")
    return fold.parent / "regions"


def test_arms_stand_in_their_order_of_value() -> None:
    assert list(ARMS) == ["uniform", "region", "shuffled", "scratch", "scratch_long", "roi", "foreground", "weighted", "edges", "uniform60", "uniform70",
                          "region70_30", "region60_20", "imagenet", "uniform60_time"]


def test_no_arm_with_masks_behind_it_is_called_text_guided() -> None:
    for one in ARMS.values():
        for source in (CROSSFIT, Source("masks"), Source("clipseg", prompt="x"), Source("edges")):
            label, supervised = one.label(source), one.supervised(source)
            assert ("supervised" in label or "uses labels" in label) == supervised
            assert not (supervised and "text" in label.replace("no text", ""))
            assert one.uses_labels(source) <= supervised
    assert ARMS["region"].label(CROSSFIT) == "supervised region source"
    assert ARMS["region"].label(Source("clipseg", prompt="x")) == "text-guided"
    assert ARMS["roi"].label(Source("clipseg", prompt="x")) == "uses labels" and ARMS["roi"].uses_labels(CROSSFIT)
    assert ARMS["uniform"].label(CROSSFIT) == "number hidden only: supervised region source"
    assert ARMS["shuffled"].label(CROSSFIT) == "regions of other images (supervised region source)"
    assert ARMS["uniform60"].label(CROSSFIT) == ARMS["scratch"].label(CROSSFIT) == "no regions"


def test_uniform_foreground_and_weighted_hide_as_region_does_by_construction() -> None:
    made = {}
    for name in ("region", "uniform", "foreground", "weighted"):
        extra = {"foreground": "f"} if name == "foreground" else {}
        made[name] = create_policy(PretrainConfig(images="i", out="o", regions="r", **extra, **ARMS[name].settings))
    assert made["uniform"].match == made["foreground"].match == made["weighted"].match == made["region"]
    assert ARMS["weighted"].settings["region_weight"] == ARMS["region"].settings["high"] / ARMS["region"].settings["low"]


def test_other_ratios_have_names_and_typing_errors_a_hint() -> None:
    assert arm("uniform45").settings == {"mask": "uniform", "mask_ratio": 0.45}
    assert arm("region90_50").settings == {"mask": "region", "high": 0.9, "low": 0.5}
    for name, words in (("shufled", "Did you mean 'shuffled'"), ("region30_70", "high at least low"), ("uniform5", "uniformNN")):
        with pytest.raises(StudyError, match=words) as caught:
            arm(name)
        assert "\n" not in str(caught.value)


def test_arms_of_one_source_share_regions_and_pretraining_takes_the_fields(fold: Path, kept: Path) -> None:
    fields = {name: region_fields(one, CROSSFIT, fold, kept, seed=0, device="cpu") for name, one in ARMS.items()}
    for name, one in ARMS.items():
        if one.pretrain:
            config = PretrainConfig(images=str(fold.with_suffix(".pretrain.csv")), out="out", **fields[name])
            assert config.reads_regions == (one.source is not None)
        else:
            assert not fields[name]
    assert {fields[name]["regions"] for name in ("uniform", "region", "foreground", "weighted", "region70_30", "region60_20")} == {str(kept / "crossfit")}
    assert fields["roi"]["regions"] == "masks" and "regions" not in fields["uniform60"]
    assert fields["foreground"]["foreground"] == str(kept / "foreground")
    train = read_list(fold.with_suffix(".pretrain.csv"))
    for name in ("crossfit", "shuffled-crossfit", "edges", "foreground"):
        store = open_regions(kept / name)
        assert all(store.has(record) for record in train)
        assert len(store) == len(train)
        assert store.region(train[0], ReadSettings()).shape == (48, 40)
    own, others = (open_regions(kept / name) for name in ("crossfit", "shuffled-crossfit"))
    assert sorted(float(own.region(r, ReadSettings()).sum()) for r in train) == sorted(float(others.region(r, ReadSettings()).sum()) for r in train)


def test_a_second_call_computes_nothing(fold: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in kept.rglob("*.*")}
    monkeypatch.setattr("mwm.study.crossfit.fit_localizer", None)
    monkeypatch.setattr("mwm.localize.edges.EdgesLocalizer._score", None)
    for name in ("shuffled", "edges", "foreground"):
        region_fields(ARMS[name], CROSSFIT, fold, kept, seed=0, device="auto")
    assert before == {path: path.read_bytes() for path in kept.rglob("*.*")}


def test_meta_says_what_the_regions_are(kept: Path) -> None:
    facts = json.loads((kept / "shuffled-crossfit" / "regions.json").read_text())["meta"]["source"]
    assert facts["kind"] == "shuffled" and facts["of"]["kind"] == "supervised region source" and facts["of"]["parts"] == 2


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "tiny", "prompt": "x"}, "must not be tiny, whose shipped weights have learnt"),
    ({"name": "oracle", "prompt": "x"}, "got 'oracle', a localizer that this version of mwm does not have"),
    ({"name": "crossfit"}, "must have a prompt"),
])
def test_sources_that_cannot_be_are_refused_in_one_sentence(settings: dict, words: str) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        Source(**settings)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_learnt_from_masks_is_no_text_guided_source(tmp_path: Path) -> None:
    for name, on in (("head", "masks"), ("towers", "captions")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({KEY: Training(on, 6, "a hash").to_dict()}))
    masks, captions = (Source("clipseg", "brain tumour", str(tmp_path / name)) for name in ("head", "towers"))
    assert masks.kind == SUPERVISED and ARMS["region"].supervised(masks) and ARMS["uniform"].label(masks) == f"number hidden only: {SUPERVISED}"
    assert captions.kind == "text-guided" and not ARMS["region"].supervised(captions)
    (tmp_path / "towers" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        _ = captions.kind


def test_a_checkpoint_cannot_hide_among_the_settings() -> None:
    """There nobody would have asked what it learnt from, and its regions would have been called text-guided."""
    with pytest.raises(StudyError, match="settings of a source must be without checkpoint and device, got checkpoint"):
        Source("clipseg", "brain tumour", settings={"checkpoint": "taught with masks"})


def test_a_foreground_is_called_by_its_localizer() -> None:
    assert ARMS["foreground"].label(CROSSFIT) == "foreground by threshold; number hidden: supervised region source"
    assert ARMS["foreground"].label(Source("edges", foreground=("clipseg", "body"))) == "foreground by clipseg; number hidden: no text, no masks"


def test_the_papers_study_is_text_guided_and_asks_for_its_weights_in_one_sentence(fold: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = StudyConfig.from_yaml(ROOT / "studies" / "paper.yaml")
    source = config.source_of("chest_ct")
    assert ARMS["region"].label(source) == "text-guided" and source.name == "bottleneck"
    assert source.refine["components"] == 2
    assert torch.tensor([config.pretrain_config(name, images="i", out="o").epochs for name in config.data]).eq(500).all()
    monkeypatch.setattr("mwm.localize.towers.hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"bottleneck: checkpoint .*BiomedCLIP.* is neither a local folder nor could it be fetched|is not installed") as caught:
        region_fields(ARMS["region"], source, fold, tmp_path, seed=0, device="cpu")
    assert "\n" not in str(caught.value)
