"""A study's file: what it may say, and what is refused before the first hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mwm.data import DataError
from mwm.study.cell_files import Cell
from mwm.study.cells import task_config
from mwm.study.config import StudyConfig
from mwm.study.errors import StudyError
from mwm.study.rehearse import _extrapolated
from mwm.study.sources import arm
from mwm.train import TrainError
from mwm.train.prepare import read_settings
from mwm.transfer import TransferError

ROOT = Path(__file__).resolve().parents[2]


def values(**more: Any) -> dict[str, Any]:
    """A small study as YAML gives it."""
    return {"data": {"a": {"index": "a/index.csv", "prompt": "body"}, "b": {"index": "b", "prompt": "body", "folds": 3}},
            "blocks": [{"data": "a", "arms": ["uniform", "scratch"], "tasks": ["probe"]}, {"data": "b", "arms": ["region"], "tasks": ["classify"]},
                       {"data": "a", "arms": ["region", "uniform"], "tasks": ["segment"]}],
            "pretrain": {"encoder": "resnet18", "image_size": 64}, "source": {"name": "threshold"}, **more}


def test_cells_come_in_the_order_of_the_blocks_and_each_once_with_all_its_tasks() -> None:
    found = list(StudyConfig.from_dict(values()).cells())
    assert found == [("a", "uniform", ("probe", "segment")), ("a", "scratch", ("probe",)), ("b", "region", ("classify",)), ("a", "region", ("segment",))]


def test_a_config_survives_yaml() -> None:
    config = StudyConfig.from_dict(values())
    assert StudyConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "studies").glob("*.yaml") if path.name != "paper.yaml"))
def test_the_studies_of_the_package_can_start(name: str) -> None:
    config = StudyConfig.from_yaml(ROOT / "studies" / name)
    assert list(config.cells())


def test_the_fingerprint_changes_with_what_changes_numbers_and_with_nothing_else() -> None:
    config = StudyConfig.from_dict(values())
    assert config.fingerprint("a", "uniform") == StudyConfig.from_dict(values(keep="all", analysis={"primary": ["region", "uniform"]})).fingerprint("a", "uniform")
    assert config.fingerprint("a", "uniform") != StudyConfig.from_dict(values(pretrain={"encoder": "resnet18", "image_size": 32})).fingerprint("a", "uniform")
    assert len({config.fingerprint("a", name) for name in ("uniform", "region", "shuffled")}) == 3


def test_results_that_are_there_keep_their_fingerprints() -> None:
    """Of cells that have been run: blocks, arms and fields that came later must not make them results of other settings."""
    studies = {name: StudyConfig.from_yaml(ROOT / "studies" / f"{name}.yaml") for name in ("cpu", "main")}
    cells = (("cpu", "brain_mri", "uniform"), ("cpu", "chest_xray", "region"), ("main", "brain_mri", "scratch"))
    found = {(name, *cell): studies[name].fingerprint(*cell) for name, *cell in cells}
    assert found == {("cpu", "brain_mri", "uniform"): "64b86aa0e69c93ba", ("cpu", "chest_xray", "region"): "1656c37ab9db561f", ("main", "brain_mri", "scratch"): "8bea28891fa2fc71"}


def test_blocks_that_came_later_come_last() -> None:
    cpu = [(data, name) for data, name, _ in StudyConfig.from_yaml(ROOT / "studies" / "cpu.yaml").pieces()]
    assert cpu[:8] == [(data, name) for data in ("brain_mri", "chest_xray") for name in ("uniform", "region", "shuffled", "scratch")]
    assert [name for _, name in cpu[8:]] == ["roi", "foreground", "weighted", "uniform60", "region70_30", "uniform60_time"]
    main = list(StudyConfig.from_yaml(ROOT / "studies" / "main.yaml").pieces())
    assert main[-4:] == [("brain_mri", name, ("detect",)) for name in ("uniform", "region", "shuffled", "scratch")] and not any("detect" in tasks for _, _, tasks in main[:-4])


@pytest.mark.parametrize(("change", "words"), [
    ({"block": []}, "'block' is no setting of a study. Did you mean 'blocks'"),
    ({"data": {}}, "data must be a mapping of data sets"),
    ({"data": {"../a": {"index": "x", "prompt": "y"}}}, "named with letters"),
    ({"data": {"a": {"index": "x"}}}, "data.a.prompt must be given"),
    ({"blocks": [{"data": "c", "arms": ["region"], "tasks": ["probe"]}]}, "block.data must be a | b, got 'c'"),
    ({"blocks": [{"data": "a", "arms": ["regoin"], "tasks": ["probe"]}]}, "Did you mean 'region'"),
    ({"blocks": [{"data": "a", "arms": ["region"], "tasks": ["clasify"]}]}, "block.tasks must be among"),
    ({"source": {"name": "tiny"}}, "must not be tiny"),
    ({"source": {"name": "threshold", "step": 3}}, "Did you mean 'steps'"),
    ({"source": {"name": "bottleneckk"}}, "does not have"),
    ({"source": {"name": "threshold", "parts": 1}}, "parts of a source must be a whole number of at least 2"),
    ({"source": {"name": "threshold", "refine": {"treshold": 0.5}}}, "refine of a source must hold fields of RefineSettings"),
    ({"pretrain": {"seed": 3}}, "which the study sets"),
    ({"pretrain": {"mask_ratio": 0.6}}, "which the study sets"),
    ({"pretrain": [1]}, "pretrain must be a mapping"),
    ({"finetune": {"classify": None}}, "finetune.classify must be a mapping"),
    ({"finetune": {"classify": {"epoch": 3}}}, "Did you mean 'epochs'"),
    ({"finetune": {"classify": {"allow_leak": True}}}, "which the study sets"),
    ({"finetune": {"classify": {"aspect": "pad"}}}, "which the study sets"),
    ({"analysis": {"primary": ["regoin", "uniform"]}}, "Did you mean 'region'"),
    ({"analysis": {"effects": {"dice": "small"}}}, "analysis must hold"),
    ({"data": {"a": {"index": "x", "prompt": "y", "labels": "glioma"}}}, "labels must be a list of texts"),
    ({"data": {"a": {"index": "x", "prompt": "y", "folds": 2.5}}}, "folds must be a whole number"),
    ({"data": {"a": {"index": "x", "prompt": "y", "source": [1]}}}, "source must be a mapping"),
    ({"data": {"a": {"index": "a", "prompt": "body", "read": {"slice_axis": "x"}}, "b": {"index": "b", "prompt": "body"}}}, "of aspect and intensity alone where scratch"),
    ({"blocks": [{"data": ["a"], "arms": ["region"], "tasks": ["probe"]}]}, "block.data must be a | b"),
    ({"blocks": [{"data": "a", "arms": [{"x": 1}], "tasks": ["probe"]}]}, "arms must be named by texts"),
    ({"keep": "everything"}, "keep must be results | encoder | all"),
    ({"finetune": {"classify": {"epochs": "ten"}}}, "finetune.classify.epochs must be a whole number or null, got 'ten'"),
    ({"finetune": {"segment": {"epochs": 1.5}}}, "finetune.segment.epochs must be a whole number or null, got 1.5"),
    ({"finetune": {"segment": {"flip": "no"}}}, "finetune.segment.flip must be true or false, got 'no'"),
    ({"finetune": {"classify": {"label_fraction": None}}}, "finetune.classify.label_fraction must be a number, got None"),
    ({"blocks": [{"data": "a", "arms": ["region"], "tasks": ["segment"], "finetune": {"segment": {"crop": [0.8]}}}]}, "block.finetune.segment.crop must be a number"),
    ({"pretrain": {"flip": "false"}}, "pretrain.flip must be true or false, got 'false'"),
    ({"pretrain": {"crop_scale": 0.5}}, "pretrain.crop_scale must be a list of 2 numbers, got 0.5"),
    ({"pretrain": {"min_lr": float("nan")}}, "pretrain.min_lr must be a number, got nan"),
    ({"pretrain": {"encoder": "resnet19"}}, "pretrain.encoder must be a model of timm, or torchvision/NAME, got 'resnet19'"),
    ({"pretrain": {"encoder": "torchvision/fcn_resnet50"}}, "pretrain.encoder must be a model of timm, or torchvision/NAME"),
    ({"pretrain": {"read": {"aspect": "crop"}}}, "which the study sets"),
    ({"data": {"a": {"index": "a", "prompt": "body", "read": {"size": 64}}, "b": {"index": "b", "prompt": "body"}}}, "without size, which pretrain.image_size gives"),
    ({"source": {"name": "threshold", "foreground": ["tiny", "body"]}}, "foreground of a source must be [localizer, prompt] with one of"),
    ({"source": {"name": "threshold", "foreground": ["threshhold", "body"]}}, "foreground of a source must be [localizer, prompt] with one of"),
    ({"source": {"name": "threshold", "foreground": 3}}, "source.foreground must be a list of 2 texts, got 3"),
    ({"source": {"name": "threshold", "prompt": 5}}, "source.prompt must be a text or null, got 5"),
    ({"blocks": [{"data": "a", "arms": ["uniform00"], "tasks": ["probe"]}]}, "above 0"),
    ({"blocks": [{"data": "a", "arms": ["region00_00"], "tasks": ["probe"]}]}, "above 0"),
    ({"analysis": {"primary_endpoints": {"a": "segment/dise"}}}, "primary_endpoints must be among classify/auroc"),
    ({"analysis": {"primary_endpoints": {"a": "probe/accuracy"}}}, "primary_endpoints must be among classify/auroc"),
    ({"analysis": {"primary_endpoints": {"brain": "segment/dice"}}}, "must speak of the study's data sets, a, b, got 'brain'"),
    ({"analysis": {"descriptive": "a"}}, "analysis.descriptive must be a list of names, got 'a'"),
    ({"analysis": {"descriptive": ["c"]}}, "must speak of the study's data sets, a, b, got 'c'"),
    ({"analysis": {"effects": {"aurocc": 0.02}}}, "effects must be positive numbers by endpoint (accuracy, auroc"),
    ({"analysis": {"effects": {"dice": -0.02}}}, "effects must be positive numbers by endpoint"),
    ({"analysis": {"contrasts": [["region", "region"]]}}, "pairs of arms"),
])
def test_a_study_that_cannot_run_is_refused_in_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=r"^study: ") as caught:
        StudyConfig.from_dict(values(**change))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_settings_of_the_runs_show_before_the_first_run() -> None:
    with pytest.raises(TrainError, match="patch_size must divide"):
        StudyConfig.from_dict(values(pretrain={"image_size": 50}))
    with pytest.raises(DataError, match="intensity must be"):
        StudyConfig.from_dict(values(pretrain={"encoder": "resnet18", "image_size": 64, "intensity": "percentil"}))
    with pytest.raises(TransferError, match="epochs must be"):
        StudyConfig.from_dict(values(finetune={"classify": {"epochs": 0}}))


def test_numbers_with_an_exponent_are_numbers_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values()) + "finetune: {classify: {lr: 3e-4}}\n")
    assert StudyConfig.from_yaml(tmp_path / "study.yaml").finetune_config("classify", run="run", data="data").lr == 3e-4


def test_an_arm_without_pretraining_reads_images_as_the_others_do(tmp_path: Path) -> None:
    data = {"a": {"index": "a", "prompt": "body", "read": {"intensity": "minmax", "aspect": "crop"}}, "b": {"index": "b", "prompt": "body"}}
    config = StudyConfig.from_dict(values(data=data, pretrain={"encoder": "resnet18", "image_size": 64, "channels": 1}))
    found = task_config(Cell("a", "scratch", 0, ("classify",)), config, tmp_path, tmp_path / "run", "classify", "cpu", None)
    read = read_settings(config.pretrain_config("a", images="images", out="out", regions="regions", **arm("region").settings))
    assert (found.intensity, found.aspect) == (read.intensity, read.aspect) == ("minmax", "crop")


def test_nesting_without_end_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("data: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(TrainError, match="nested too deeply"):
        StudyConfig.from_yaml(tmp_path / "study.yaml")


def test_twenty_steps_tell_the_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("mwm.study.rehearse.time.monotonic", lambda: clock[0])

    def train(epochs: int) -> None:
        clock[0] += 5 + 2 * epochs  # 5 s around the epochs, 2 s each

    assert _extrapolated(train, per_epoch=7, epochs=100) == pytest.approx(205)
