"""What a study is told: a YAML file of data sets, common settings, and blocks of cells in the order in which they are run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from mwm.data import ReadSettings
from mwm.study.analysis import Plan
from mwm.study.errors import StudyError
from mwm.study.sources import Source, arm
from mwm.study.typed import check_encoder, check_types
from mwm.train import PretrainConfig
from mwm.train.config import as_number, read_yaml
from mwm.transfer import FinetuneConfig

TASKS = ("classify", "probe", "segment", "detect")
_PRETRAIN_FIXED = frozenset({"images", "out", "regions", "foreground", "split", "prompt", "localizer", "seed", "resume", "overwrite", "device",
                             "mask", "mask_settings", "mask_ratio", "high", "low", "region_weight", "read", "localizer_checkpoint", "localizer_revision"})
_FINETUNE_FIXED = frozenset({"run", "data", "out", "init", "encoder", "image_size", "channels", "intensity", "aspect", "labels", "task", "linear_probe", "knn",
                             "seed", "resume", "overwrite", "device", "store_weights", "allow_leak"})
"""What the study sets by itself, or a data set says (read): a value in the file would be ignored in some arms and count in others."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""Of data sets and arms: parts of paths."""


@dataclass(frozen=True)
class DataSet:
    """A labelled data set of a study.

    Attributes:
        name: of its folders and rows.
        index: index CSV, or the folder that holds index.csv; relative to the root of the study.
        prompt: what its regions show, in words.
        folds: number of folds, or "fit".
        labels: classes to keep; None for all.
        subset: value of the CSV's column subset to keep.
        read: settings of `mwm.data.ReadSettings`, for example {"aspect": "crop"}.
        source: fields of `Source` for this data set; they win over those of the study.
    """

    name: str
    index: str
    prompt: str
    folds: int | str = 5
    labels: tuple[str, ...] | None = None
    subset: str | None = None
    read: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Cells that follow each other: every arm on every fold of one data set, with these tasks.

    Attributes:
        data: name of the data set.
        arms: names of the arms.
        tasks: in the order in which they are run.
        finetune: fields of `FinetuneConfig` by task, for this block alone; they win over those of the study.
    """

    data: str
    arms: tuple[str, ...]
    tasks: tuple[str, ...]
    finetune: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """A study, checked on creation.

    Attributes:
        data: by name.
        blocks: in the order in which they are run; a budget keeps the first cells.
        pretrain: fields of `PretrainConfig`, the same for every arm.
        finetune: fields of `FinetuneConfig` by task; `probe` is a classification with a linear probe.
        source: fields of `Source`, where the regions come from.
        analysis: what the tables show (primary contrast, endpoints).
        keep: what stays of a cell all of whose tasks are finished: "results", "encoder" (the exported weights, too) or "all" (checkpoints, too). With "results" a task
            that is added to the file later pre-trains the cell again.

    Raises:
        StudyError: a field is unknown or out of its range.
    """

    data: dict[str, DataSet]
    blocks: tuple[Block, ...]
    pretrain: dict[str, Any] = field(default_factory=dict)
    finetune: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    keep: str = "encoder"

    @classmethod
    def from_yaml(cls, path: str | Path) -> StudyConfig:
        """Read a study from a file."""
        return cls.from_dict(_numbers(read_yaml(path)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyConfig:
        """From plain values, as YAML gives them."""
        values = dict(_known(values, cls, "a study"))
        data = values.get("data")
        _need(isinstance(data, dict) and data, "data", "a mapping of data sets", data)
        sets = {}
        for name, settings in data.items():
            _need(isinstance(name, str) and NAME.fullmatch(name), "data", "named with letters, digits, dots, dashes and underscores", name)
            _need(isinstance(settings, dict), f"data.{name}", "a mapping with index and prompt", settings)
            settings = _known({"name": name, **settings}, DataSet, f"the data set {name}")
            for needed in ("index", "prompt"):
                _need(isinstance(settings.get(needed), str) and settings[needed], f"data.{name}.{needed}", "given", settings.get(needed))
            sets[name] = _data_set(settings)
        blocks = values.get("blocks")
        _need(isinstance(blocks, list) and blocks, "blocks", "a list of {data, arms, tasks}", blocks)
        values["data"], values["blocks"] = sets, tuple(_block(block, sets) for block in blocks)
        config = cls(**values)
        _need(config.keep in ("results", "encoder", "all"), "keep", "results | encoder | all", config.keep)
        config._check_runs()
        return config

    def _check_runs(self) -> None:
        """Let the configs of the runs and tables speak before the first hour, not after it."""
        for name in ("pretrain", "finetune", "source", "analysis"):
            _need(isinstance(getattr(self, name), dict), name, "a mapping of settings", getattr(self, name))
        _set_by_user(self.pretrain, _PRETRAIN_FIXED, "pretrain")
        check_types(self.pretrain, PretrainConfig, "pretrain")
        check_encoder(self.pretrain.get("encoder", PretrainConfig.encoder))
        _check_tasks(self.finetune, TASKS, "finetune")
        Plan.from_dict(self.analysis, self.data)
        for block in self.blocks:
            self.source_of(block.data)
            ReadSettings.from_dict({"intensity": self.pretrain.get("intensity", PretrainConfig.intensity), **self.data[block.data].read})
            others = sorted(set(self.data[block.data].read) - {"aspect", "intensity"})
            for name in block.arms:
                _need(arm(name).pretrain or not others, f"data.{block.data}.read", f"of aspect and intensity alone where {name}, which has no pre-training, is an arm",
                      ", ".join(others))
                if arm(name).pretrain:
                    self.pretrain_config(block.data, images="images", out="out", regions="regions", **arm(name).settings,
                                         **({"foreground": "foreground"} if arm(name).foreground else {}))
            _check_tasks(block.finetune, block.tasks, "block.finetune")
            for task in block.tasks:
                self.finetune_config(task, run="run", data="data", out="out", **block.finetune.get(task, {}))
                for name in block.arms:
                    _need(self.block_settings(task, block.data, name) == block.finetune.get(task, {}) or task not in block.finetune, f"block.finetune.{task}",
                          f"as in the first block with {task} of {name} on {block.data}", block.finetune.get(task))

    def source_of(self, data: str) -> Source:
        """Where the regions of a data set come from."""
        return Source(**_known({"prompt": self.data[data].prompt, **self.source, **self.data[data].source}, Source, f"the region source of {data}"))

    def pretrain_config(self, data: str, **more: Any) -> PretrainConfig:
        """The pre-training of a data set; `more` wins."""
        return PretrainConfig.from_dict({"read": self.data[data].read, **self.pretrain, **more})

    def finetune_config(self, task: str, **more: Any) -> FinetuneConfig:
        """The configuration of a task; `more` wins."""
        kind = {"task": "classify", "linear_probe": True} if task == "probe" else {"task": task}
        return FinetuneConfig(**{**kind, **self.finetune.get(task, {}), **more})

    def block_settings(self, task: str, data: str, name: str) -> dict[str, Any]:
        """The fields of `FinetuneConfig` that the first block with this task of an arm on a data set brings along."""
        return next((block.finetune.get(task, {}) for block in self.blocks if block.data == data and name in block.arms and task in block.tasks), {})

    def cells(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """(data set, arm, tasks) of every block in order, each pair once, with the tasks of all its blocks; folds are not known here."""
        tasks: dict[tuple[str, str], list[str]] = {}
        for data, name, found in self.pieces():
            tasks.setdefault((data, name), []).extend(found)
        for (data, name), found in tasks.items():
            yield data, name, tuple(found)

    def pieces(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """(data set, arm, tasks) of every block in order, without the tasks that an earlier block has: what is run when, so that a budget is spent block by block."""
        held: set[tuple[str, str, str]] = set()
        for block in self.blocks:
            for name in block.arms:
                tasks = tuple(dict.fromkeys(task for task in block.tasks if (block.data, name, task) not in held))
                held.update((block.data, name, task) for task in tasks)
                if tasks:
                    yield block.data, name, tasks

    def tasks_of(self, data: str, name: str) -> tuple[str, ...]:
        """All tasks that the blocks give an arm on a data set."""
        return next((tasks for found, other, tasks in self.cells() if (found, other) == (data, name)), ())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        for settings in plain["data"].values():
            del settings["name"]
        for block in plain["blocks"]:
            if not block["finetune"]:
                del block["finetune"]
        return plain

    def fingerprint(self, data: str, name: str, weights: str | None = None) -> str:
        """Hash of everything that decides the numbers of a data set's cells of an arm, except the tasks and what blocks say.

        The settings of all tasks are in it, so that it alone cannot say which of them a change concerns: `base_fingerprint` and `task_fingerprint` do.

        Args:
            data: name of the data set.
            name: of the arm.
            weights: hash of the file of ImageNet weights, where the arm starts from it.
        """
        plain = self.to_dict()
        return _digest([plain["data"][data], plain["pretrain"], plain["finetune"], plain["source"], arm(name).facts(), *([weights] if weights else [])])

    def base_fingerprint(self, data: str, name: str, weights: str | None = None) -> str:
        """As `fingerprint`, without the settings of the tasks."""
        plain = self.to_dict()
        return _digest([plain["data"][data], plain["pretrain"], plain["source"], arm(name).facts(), *([weights] if weights else [])])

    def task_fingerprint(self, task: str, data: str | None = None, name: str | None = None) -> str:
        """Hash of the settings of a task: of the study's, and with a data set and an arm those of their block on top."""
        own = {} if data is None or name is None else self.block_settings(task, data, name)
        return _digest([task, json.loads(json.dumps({**self.finetune.get(task, {}), **own}))])


def _digest(facts: Any) -> str:
    return blake2b(json.dumps(facts, sort_keys=True, default=dict).encode(), digest_size=8).hexdigest()


def _check_tasks(settings: Any, tasks: tuple[str, ...], where: str) -> None:
    """Refuse what is no mapping of settings by task."""
    _need(isinstance(settings, dict), where, "a mapping of settings by task", settings)
    for name, own in settings.items():
        _need(name in tasks, where, f"by task: {' | '.join(tasks)}", name)
        _need(isinstance(own, dict), f"{where}.{name}", "a mapping of settings", own)
        _set_by_user(_known(own, FinetuneConfig, f"{where}.{name}"), _FINETUNE_FIXED, f"{where}.{name}")
        check_types(own, FinetuneConfig, f"{where}.{name}")


def _block(values: Any, sets: dict[str, DataSet]) -> Block:
    _need(isinstance(values, dict), "blocks", "a list of {data, arms, tasks}", values)
    values = _known(values, Block, "a block")
    _need(isinstance(values.get("data"), str) and values["data"] in sets, "block.data", " | ".join(sets), values.get("data"))
    for name in ("arms", "tasks"):
        given = values.get(name)
        _need(isinstance(given, list) and given, f"block.{name}", "a list", given)
        values[name] = tuple(given)
    for name in values["arms"]:
        arm(name)
    for task in values["tasks"]:
        _need(task in TASKS, "block.tasks", f"among {', '.join(TASKS)}", task)
    return Block(**values)


def _data_set(settings: dict[str, Any]) -> DataSet:
    """A data set of checked settings."""
    where, labels = f"data.{settings['name']}", settings.get("labels")
    _need(labels is None or (isinstance(labels, list) and labels and all(isinstance(label, str) for label in labels)), f"{where}.labels", "a list of texts", labels)
    _need(settings.get("subset") is None or isinstance(settings["subset"], str), f"{where}.subset", "a text", settings.get("subset"))
    folds = settings.get("folds", 5)
    _need(folds == "fit" or (isinstance(folds, int) and not isinstance(folds, bool) and 3 <= folds <= 1000), f"{where}.folds", "a whole number from 3 to 1000, or fit", folds)
    for name in ("read", "source"):
        _need(isinstance(settings.get(name, {}), dict), f"{where}.{name}", "a mapping of settings", settings.get(name))
    _need("size" not in settings.get("read", {}), f"{where}.read", "without size, which pretrain.image_size gives", settings.get("read"))
    ReadSettings.from_dict(settings.get("read", {}))
    return DataSet(**{**settings, "labels": tuple(labels) if labels else None})


def _set_by_user(values: dict[str, Any], fixed: frozenset[str], where: str) -> None:
    taken = sorted(fixed & set(values))
    _need(not taken, where, f"without {', '.join(sorted(fixed))}, which the study sets", ", ".join(taken))


def _numbers(values: Any) -> Any:
    """1e-4 without a point, which YAML 1.1 reads as text, as a number at every depth."""
    if isinstance(values, dict):
        return {name: _numbers(value) for name, value in values.items()}
    return [_numbers(value) for value in values] if isinstance(values, list) else as_number(values)


def _known(values: dict[str, Any], kind: type, words: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.4)
            raise StudyError(f"study: {name!r} is no setting of {words}.{f' Did you mean {near[0]!r}?' if near else ''} The settings are {', '.join(names)}.")
    return dict(values)


def _need(holds: Any, name: str, rule: str, got: Any) -> None:
    if not holds:
        raise StudyError(f"study: {name} must be {rule}, got {got!r}.")
