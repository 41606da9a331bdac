"""A study's finished cells in one file without names: `mwm study --pack FILE --out STUDY`, and `--unpack FILE` into another folder.

What the tables are made from goes in: answers of the test images (numbered by `numbering`), figures, facts of cells and regions, folds. Images, masks, regions, weights, answers
of other splits, messages of failures and paths stay where they are. Unpacked alone it gives the same tables again; unpacked beside the data set, the study goes on from there.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from mwm.study.cell_files import CELL, read_facts
from mwm.study.collect import collect
from mwm.study.config import NAME, TASKS, StudyConfig
from mwm.study.errors import StudyError
from mwm.study.mask_facts import STORED as MASK_FACTS
from mwm.study.mask_facts import mask_facts
from mwm.study.named import STORED as NAMED
from mwm.study.named import merge_named, named
from mwm.study.numbering import number_folds, only_detections, rename_coco, rename_csv
from mwm.study.region_facts import STORED as REGION_FACTS
from mwm.study.region_facts import region_facts
from mwm.study.report import needs_shortcut, shortcut_answers
from mwm.train.checkpoint import write_atomic, write_text

_N = NAME.pattern
_MEMBER = re.compile(rf"study\.yaml|{re.escape(NAMED)}|folds/{_N}/(\d{{1,4}}\.csv|folds\.json)|shortcut/{_N}\.csv|({REGION_FACTS}|{MASK_FACTS})/{_N}/\d{{1,4}}/{_N}\.json|"
                     rf"cells/{_N}/{_N}/\d{{1,4}}/(cell\.json|run/(config\.yaml|run\.json)|"
                     rf"({'|'.join(TASKS)})/(metrics\.json|predictions\.csv|predictions\.json|ground_truth\.json))")
_MOST, _LARGEST, _WHOLE = 50_000, 256 * 2**20, 2 * 2**30
"""Members, bytes of one, bytes of all: far more than a study has, far less than would fill a disk."""
_RUN = {"config.yaml": ("encoder", "image_size", "channels"), "run.json": ("device", "commit")}
_UNTOLD = "the message stayed with the study"


def pack(out: str | Path, file: str | Path) -> int:
    """Write what is finished of a study into one archive, without names of images, patients or folders; the same study gives the same bytes.

    What masks hid goes in as far as a report, or `mwm study --masks`, has drawn it.

    Args:
        out: folder of the study.
        file: ZIP to write; replaced where it exists.

    Returns:
        Number of cells.

    Raises:
        StudyError: nothing is finished, or what is there does not fit together.
    """
    root, target = Path(out), Path(file)
    found = collect(root)
    members = {"study.yaml": yaml.safe_dump(_without_paths(StudyConfig.from_yaml(root / "study.yaml").to_dict()), sort_keys=False, allow_unicode=True)}
    if (root / NAMED).is_file():
        members[NAMED] = (root / NAMED).read_text(encoding="utf-8")
    numbers = {}
    for data in found.folds:
        folds = number_folds(root / "folds" / data)
        numbers[data] = folds.images
        members |= {f"folds/{data}/{fold}.csv": text for fold, text in folds.tables.items()}
        if (facts := root / "folds" / data / "folds.json").is_file():
            members[f"folds/{data}/folds.json"] = facts.read_text(encoding="utf-8")
        if needs_shortcut(found, data):
            shortcut_answers(root, data, found)  # made where no table has asked for it yet
            members[f"shortcut/{data}.csv"] = rename_csv((root / "shortcut" / f"{data}.csv").read_text(encoding="utf-8"), folds.images)
    for stored, name, rows in ((REGION_FACTS, "regions", region_facts(root)), (MASK_FACTS, "arm", mask_facts(root, draw=False))):
        members |= {f"{stored}/{row['data_set']}/{row['fold']}/{row[name]}.json": json.dumps(row, indent=1) + "\n" for row in rows}
    cells = list(dict.fromkeys((row["data_set"], row["arm"], row["seed"]) for row in found.rows))
    for data, arm, seed in cells:
        name = f"cells/{data}/{arm}/{seed}"
        members |= {f"{name}/{path}": text for path, text in _cell(root / name, numbers.get(data, {}))}

    def write(stream: BinaryIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for path in sorted(members):
                archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), members[path], zipfile.ZIP_DEFLATED)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, write)
    return len(cells)


def unpack(file: str | Path, out: str | Path, *, folds: Mapping[str, Path] | None = None) -> tuple[int, int]:
    """Put the cells of an archive into a study; cells that are there already stay as they are.

    Args:
        file: from `pack`.
        out: folder of the study.
        folds: data set -> OUT/folds/DATA_SET, made from the data: images get their names back. None: numbers stay, nothing but tables can be made of them.

    Returns:
        Cells that were put there, and cells that were there before.

    Raises:
        StudyError: it is no such archive; it holds what does not fit together; its folds are not those of the data; or, without `folds`, there is a study already.
    """
    root = Path(out)
    if folds is None and root.exists() and any(root.iterdir()):
        raise StudyError(f"study: out must be a new folder where an archive is unpacked without CONFIG, got {root}, which has something in it. "
                         "Choose another --out, or give the CONFIG and --root to go on with a study.")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=root) as scratch:
        temporary = Path(scratch)
        for name, content in _members(Path(file)):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        _check(temporary, Path(file))
        if folds is None:
            for path in sorted(temporary.iterdir()):
                if not path.name.startswith("."):
                    path.replace(root / path.name)
            return len(list((root / "cells").glob("*/*/*"))), 0
        names = {data: _same_folds(temporary / "folds" / data, folder, data) for data, folder in folds.items() if (temporary / "folds" / data).is_dir()}
        return _put(temporary, root, names)


def _cell(folder: Path, numbers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Path and text of what tables need of a cell."""
    facts = read_facts(folder)
    untold = {"error": _UNTOLD} if facts.get("error") else {}
    yield CELL, json.dumps(facts | untold | ({"failed_before": [_UNTOLD]} if facts.get("failed_before") else {}), indent=1) + "\n"
    if (folder / "run" / "config.yaml").is_file():
        whole = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))
        resolved = {"resolved": {"regions": regions}} if (regions := (whole.get("resolved") or {}).get("regions")) else {}
        yield "run/config.yaml", yaml.safe_dump({name: whole[name] for name in _RUN["config.yaml"] if name in whole} | resolved, sort_keys=False)
    if account := read_facts(folder / "run", "run.json"):
        yield "run/run.json", json.dumps({name: account[name] for name in _RUN["run.json"] if name in account}, indent=1) + "\n"
    for task in TASKS:
        if not (folder / task / "metrics.json").is_file():
            continue
        report = read_facts(folder / task, "metrics.json")
        test = {name: value for name, value in (report.get("test") or {}).items() if isinstance(value, int | float) or (isinstance(value, dict) and "value" in value)}
        yield f"{task}/metrics.json", json.dumps({"task": report.get("task"), "test": test}, indent=1) + "\n"
        for name, rename in _RENAMED.items():
            if (folder / task / name).is_file():
                yield f"{task}/{name}", rename((folder / task / name).read_text(encoding="utf-8"), numbers)


_RENAMED: dict[str, Callable[[str, Mapping[str, str]], str]] = {
    "predictions.csv": lambda text, names: rename_csv(text, names, keep=lambda row: row.get("split") == "test"),
    "predictions.json": lambda text, names: only_detections(text),
    "ground_truth.json": rename_coco,
}
"""Files of answers, and how their images get other names; detections name images by number already."""


def _without_paths(value: Any) -> Any:
    """Settings whose absolute paths are cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_paths(held) for name, held in value.items()}
    if isinstance(value, list):
        return [_without_paths(held) for held in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]|\.\.", value) else value


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive; nothing but files that `pack` writes, within limits."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos, total = archive.infolist(), 0
            if len(infos) > _MOST or len({info.filename for info in infos}) < len(infos):
                raise StudyError(f"study: an archive must hold each file once and at most {_MOST} files, got {len(infos)} in {file.name}. Was it made by mwm study --pack?")
            for info in infos:
                if not _MEMBER.fullmatch(info.filename):
                    raise StudyError(f"study: an archive must hold only what mwm study --pack writes, got {info.filename[:80]!r} in {file.name}. Nothing was unpacked.")
                with archive.open(info) as member:
                    content = member.read(_LARGEST + 1)
                total += len(content)
                if len(content) > _LARGEST or total > _WHOLE:
                    raise StudyError(f"study: an archive must hold at most {_LARGEST >> 20} MiB in one file and {_WHOLE >> 30} GiB in all, got more in {file.name}. "
                                     "Nothing was unpacked.")
                yield info.filename, content
    except StudyError:
        raise
    except OSError as error:
        raise StudyError(f"study: the archive must be readable, got {error.strerror}: {file}. Check the path.") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as error:  # damaged, encrypted, or compressed in an unknown way
        raise StudyError(f"study: {file} must be an archive of mwm study --pack, got something else or a damaged one ({type(error).__name__}).") from error


def _check(folder: Path, file: Path) -> None:
    """Refuse an archive that no table could be made of."""
    try:
        StudyConfig.from_yaml(folder / "study.yaml")
        named(folder)
        collect(folder)
    except StudyError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError) as error:
        raise StudyError(f"study: {file.name} must hold what mwm study --pack writes, got files that cannot be read as that "
                         f"({type(error).__name__}: {str(error)[:120]}).") from error


def _same_folds(packed: Path, folder: Path, data: str) -> dict[str, str]:
    """Number -> name of the images of a data set whose folds are those of the archive."""
    numbers = number_folds(folder)
    for fold in set(numbers.tables) | {int(path.stem) for path in packed.glob("*.csv")}:
        path = packed / f"{fold}.csv"
        if not path.is_file() or path.read_text(encoding="utf-8") != numbers.tables.get(fold):
            raise StudyError(f"study: the folds of {data} must be those that the archive was made with, got another fold {fold}. "
                             "Give the same data set and settings, or unpack without CONFIG to make tables alone.")
    return {number: name for name, number in numbers.images.items()}


def _put(temporary: Path, root: Path, names: Mapping[str, Mapping[str, str]]) -> tuple[int, int]:
    """Cells, the shortcut row and facts of regions, with names; each cell is there as a whole or not at all."""
    put = before = 0
    merge_named(temporary, root)
    for cell in sorted((temporary / "cells").glob("*/*/*")):
        data = cell.parts[-3]
        if data not in names:
            continue
        target = root / cell.relative_to(temporary)
        if target.exists():
            before += 1
            continue
        for path in cell.glob("*/*"):
            if path.name == "predictions.csv":
                write_text(path, rename_csv(path.read_text(encoding="utf-8"), names[data]))
            elif path.name == "ground_truth.json":
                write_text(path, rename_coco(path.read_text(encoding="utf-8"), names[data]))
        target.parent.mkdir(parents=True, exist_ok=True)
        cell.replace(target)
        put += 1
    for data, known in names.items():
        path, target = temporary / "shortcut" / f"{data}.csv", root / "shortcut" / f"{data}.csv"
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_text(target, rename_csv(path.read_text(encoding="utf-8"), known))
        for path in sorted(path for stored in (REGION_FACTS, MASK_FACTS) for path in (temporary / stored / data).glob("*/*.json")):
            target = root / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return put, before
