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

from mwm.study.errors import StudyError
from mwm.study.sources import Source, arm
from mwm.train import PretrainConfig
from mwm.train.config import read_yaml
from mwm.transfer import FinetuneConfig

TASKS = ("classify", "probe", "segment", "detect")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


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
    """Cells that follow each other: every arm on every fold of one data set, with these tasks."""

    data: str
    arms: tuple[str, ...]
    tasks: tuple[str, ...]


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
        keep: what stays of a finished cell: "results", "encoder" (the exported weights, too) or "all" (checkpoints, too).

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
        return cls.from_dict(read_yaml(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyConfig:
        """From plain values, as YAML gives them."""
        values = dict(_known(values, cls, "a study"))
        data = values.get("data")
        _need(isinstance(data, dict) and data, "data", "a mapping of data sets", data)
        sets = {}
        for name, settings in data.items():
            _need(isinstance(name, str) and _NAME.fullmatch(name), "data", "named with letters, digits, dots, dashes and underscores", name)
            _need(isinstance(settings, dict), f"data.{name}", "a mapping with index and prompt", settings)
            settings = _known({"name": name, **settings}, DataSet, f"the data set {name}")
            for needed in ("index", "prompt"):
                _need(isinstance(settings.get(needed), str) and settings[needed], f"data.{name}.{needed}", "given", settings.get(needed))
            settings["labels"] = tuple(settings["labels"]) if settings.get("labels") else None
            sets[name] = DataSet(**settings)
        blocks = values.get("blocks")
        _need(isinstance(blocks, list) and blocks, "blocks", "a list of {data, arms, tasks}", blocks)
        values["data"], values["blocks"] = sets, tuple(_block(block, sets) for block in blocks)
        config = cls(**values)
        _need(config.keep in ("results", "encoder", "all"), "keep", "results | encoder | all", config.keep)
        config._check_runs()
        return config

    def _check_runs(self) -> None:
        """Let the configs of the runs speak before the first hour, not after it."""
        for name in self.finetune:
            _need(name in TASKS, "finetune", f"by task: {' | '.join(TASKS)}", name)
        fixed = {"images", "out", "regions", "split", "prompt", "localizer", "seed", "resume", "overwrite", "device"}
        taken = fixed & set(self.pretrain)
        _need(not taken, "pretrain", f"without {', '.join(sorted(fixed))}, which the study sets", ", ".join(taken))
        for block in self.blocks:
            self.source_of(block.data)
            for name in block.arms:
                if arm(name).pretrain:
                    self.pretrain_config(block.data, images="images", out="out", regions="regions", **arm(name).settings,
                                         **({"foreground": "foreground"} if arm(name).foreground else {}))
            for task in block.tasks:
                self.finetune_config(task, run="run", data="data", out="out")

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

    def cells(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """(data set, arm, tasks) of every block in order, each pair once, with the tasks of all its blocks; folds are not known here."""
        tasks: dict[tuple[str, str], list[str]] = {}
        for block in self.blocks:
            for name in block.arms:
                held = tasks.setdefault((block.data, name), [])
                held.extend(task for task in block.tasks if task not in held)
        for (data, name), found in tasks.items():
            yield data, name, tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))
        for settings in plain["data"].values():
            del settings["name"]
        return plain

    def fingerprint(self, data: str, name: str) -> str:
        """Hash of everything that decides the numbers of a data set's cells of an arm, except the tasks."""
        plain = self.to_dict()
        facts = [plain["data"][data], plain["pretrain"], plain["finetune"], plain["source"], dataclasses.asdict(arm(name))]
        return blake2b(json.dumps(facts, sort_keys=True, default=dict).encode(), digest_size=8).hexdigest()


def _block(values: Any, sets: dict[str, DataSet]) -> Block:
    _need(isinstance(values, dict), "blocks", "a list of {data, arms, tasks}", values)
    values = _known(values, Block, "a block")
    _need(values.get("data") in sets, "block.data", " | ".join(sets), values.get("data"))
    for name in ("arms", "tasks"):
        given = values.get(name)
        _need(isinstance(given, list) and given, f"block.{name}", "a list", given)
        values[name] = tuple(given)
    for name in values["arms"]:
        arm(name)
    for task in values["tasks"]:
        _need(task in TASKS, "block.tasks", f"among {', '.join(TASKS)}", task)
    return Block(**values)


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
