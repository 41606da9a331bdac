"""The tables of a study as Markdown: no number without its interval, its patients and what kind of statement it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mwm.study.analysis import DESCRIPTIVE, EXPLORATORY, PRIMARY, SHORTCUT, SHOWN, ArmFigure, Difference
from mwm.study.collect import Collected
from mwm.study.sources import ARMS
from mwm.study.statistics import Estimate

NAMES = {"auroc": "AUROC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro-F1", "dice": "Dice", "iou": "IoU", "nsd": "surface Dice",
         "hd95": "HD95", "box_ap": "box AP", "box_ap50": "box AP50", "box_ap75": "box AP75", "mask_ap": "mask AP", "mask_ap50": "mask AP50", "mask_ap75": "mask AP75"}
TASKS = {"classify": "classification, fine-tuned", "probe": "classification, linear probe", "segment": "segmentation", "detect": "detection"}
_LONG = {"hd95"}  # not in [0, 1]: fewer decimals


def tables(found: Collected, figures: Sequence[ArmFigure], differences: Sequence[Difference], *, regions: Sequence[Mapping[str, Any]] = (), masks: Sequence[Mapping[str, Any]] = (),
           late: Mapping[tuple[str, str, str], int] | None = None, unfinished: Sequence[str] = (), title: str = "Results") -> str:
    """All tables of a study.

    Args:
        found: Collected cells.
        figures: Of every arm.
        differences: The contrasts.
        regions: From `region_facts`.
        masks: From `mask_facts`.
        late: From `mwm.study.named.late`: (data set, arm, task) that came after results, with their number.
        unfinished: Cells that were planned and neither finished nor failed: DATA/ARM/FOLD.
        title: First line.
    """
    parts = [f"# {title}", _legend()]
    for data in sorted(found.folds):
        parts.append(f"## {data}\n\n{_about(found, data)}")
        own = [row for row in figures if row.data == data]
        for task in SHOWN:
            shown = [row for row in own if row.task == task or (row.arm == SHORTCUT and task == "probe")]
            if any(row.arm != SHORTCUT for row in shown):
                parts.append(f"### {data}: {TASKS[task]}\n\n{_arms(found, data, task, shown)}")
        contrasts = [row for row in differences if row.data == data]
        if contrasts:
            parts.append(f"### {data}: contrasts\n\n{_contrasts(contrasts, late or {})}")
        known = [row for row in regions if row["data_set"] == data]
        if known:
            parts.append(f"### {data}: the regions\n\n{_region_table(known)}")
        drawn = [row for row in masks if row["data_set"] == data]
        if drawn:
            parts.append(f"### {data}: what the masks hid\n\n{mask_table(found.arms(data), drawn)}")
        parts.append(f"### {data}: what it cost\n\n{_cost(found, data)}")
    if late:
        parts.append(f"## Named after results were there\n\n{_late(late)}")
    parts.append(f"## Cells that failed or were not run\n\n{_missing(found, unfinished)}")
    return "\n\n".join(parts) + "\n"


def _legend() -> str:
    return ("Numbers in brackets are 95 % intervals over patients (or blocks of slices, where patients are not published): bootstrap of whole patients over the pooled "
            "out-of-fold answers, paired in contrasts, widened for few patients. AUROC and AP compare images of one fold only. `folds` is the range over single folds, each "
            "with its own seed. `detectable` is the true difference that this design finds in 80 % of studies at 5 %. Primary: fixed before the first test number. "
            "Exploratory: everything else, p values Holm-corrected within the data set. Descriptive: no inference. A supervised region source has learnt from masks of "
            "training patients; no row with one is text-guided.")


def _about(found: Collected, data: str) -> str:
    folds = found.folds[data]
    images = sum(len(test) for test in folds.test.values())
    patients = len({patient for test in folds.test.values() for patient in test.values()})
    by_class = ", ".join(f"{name} {count}" for name, count in (folds.facts.get("patients") or {}).items())
    text = f"{images} images of {patients} patients or blocks in {len(folds.test)} folds" + (f" ({by_class})." if by_class else ".")
    if folds.descriptive:
        text += " **Descriptive only: a class has fewer than five patients or blocks; nothing can be inferred.**"
    if folds.facts.get("patients_known") is False:
        text += " Patients are not known for all images: intervals are too narrow."
    for (name, fold), kinds in sorted(found.regions.items()):
        if name == data and len(kinds) > 1:
            text += (f" **Fold {fold}: the arms did not see the same regions ({' / '.join(', '.join(sorted(arms)) for arms in kinds.values())}); their difference is not that "
                     "of the arms alone.**")
    return text


def _arms(found: Collected, data: str, task: str, rows: Sequence[ArmFigure]) -> str:
    endpoints = [endpoint for endpoint in SHOWN[task] if any(row.endpoint == endpoint for row in rows)]
    arms = list(dict.fromkeys(row.arm for row in rows))
    arms.sort(key=lambda arm: arm == SHORTCUT)
    marked = {row.endpoint for row in rows if row.kind == PRIMARY and row.arm != SHORTCUT}  # that row is of fine-tuning, also beside a probe
    header = ["arm", "regions", *(NAMES[e] + (" (primary)" if e in marked else "") for e in endpoints), f"folds: {NAMES[endpoints[0]]}", "images / patients / folds"]
    body = []
    for arm in arms:
        held = {row.endpoint: row for row in rows if row.arm == arm}
        first = held.get(endpoints[0]) or next(iter(held.values()))
        body.append([f"`{arm}`" if arm != SHORTCUT else "shortcut: size, brightness, border", _regions(found, data, arm),
                     *(_figure(held[e].figure, e, held[e].kind) if e in held else "" for e in endpoints),
                     " to ".join(_number(value, endpoints[0]) for value in first.figure.spread), f"{first.figure.images} / {first.figure.patients} / {first.figure.folds}"])
    return _table(header, body)


def _regions(found: Collected, data: str, arm: str) -> str:
    """What the regions of an arm are; every row says so where labels are behind them."""
    if arm == SHORTCUT:
        return "none; sees no anatomy"
    row = next((row for row in found.rows if row["data_set"] == data and row["arm"] == arm and row["status"] == "done"), {})
    words = row.get("regions") or ""
    if row.get("uses_labels") and "uses labels" not in words:
        words = f"{words}; uses labels".strip("; ")
    if row.get("supervised_region_source") and not row.get("uses_labels") and "supervised region source" not in words:
        words = f"{words}; supervised region source".strip("; ")
    return words


def _contrasts(rows: Sequence[Difference], late: Mapping[tuple[str, str, str], int]) -> str:
    header = ["contrast", "task", "endpoint", "difference", "p", "Holm p", "detectable", "images / patients / folds", "folds", "kind", "reading"]
    body = []
    for row in rows:
        figure = row.figure
        bare, named_late = row.kind == DESCRIPTIVE, any((row.data, arm, row.task) in late for arm in (row.first, row.second))
        body.append([f"`{row.first}` − `{row.second}`", TASKS[row.task], NAMES[row.endpoint],
                     _signed(figure.difference) + ("" if bare else f" ({_signed(figure.low)} to {_signed(figure.high)})"), _p(figure.p),
                     _p(row.p_holm) if row.kind == EXPLORATORY else "", "" if bare else _number(figure.detectable, row.endpoint),
                     f"{figure.images} / {figure.patients} / {figure.folds}", ", ".join(_signed(value) for _, value in sorted(figure.by_fold.items())),
                     (f"**{row.kind}**" if row.kind == PRIMARY else row.kind) + (", named late" if named_late else ""), row.verdict])
    return _table(header, body)


def _region_table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["regions", "kind", "folds", "Dice against the masks", "missed", "empty", "Dice between own and given region"]
    body = []
    for name in dict.fromkeys(row["regions"] for row in rows):
        held = [row for row in rows if row["regions"] == name]
        body.append([f"`{name}`", str(held[0]["kind"] or ""), str(len(held)), *(_plain(_mean(row[key] for row in held), 3) for key in ("dice", "missed", "empty", "overlap"))])
    return _table(header, body) + ("\n\nMeans over folds, of the training images. Missed: Dice below 0.1. The last column is what shuffling leaves of localisation, as anatomy "
                                   "lies where it lies: the nearer to 1, the less the contrast to `shuffled` can say.")


def mask_table(arms: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the masks of a data set's arms hid, from `mask_facts`, as Markdown; arms in the given order."""
    header = ["arm", "folds", "patches hidden", "of the true region's area hidden", "patches that it covers"]
    body = []
    for name in [arm for arm in arms if any(row["arm"] == arm for row in rows)]:
        held = [row for row in rows if row["arm"] == name]
        body.append([f"`{name}`", str(len(held)), *(_plain(_mean(row[key] for row in held), 3) for key in ("hidden", "hidden_inside")),
                     f"{_plain(_mean(row['patches_inside'] for row in held), 2)} of {held[0]['patches']}"])
    return _table(header, body) + ("\n\nMeans over views of training images, crops included, whose masks were drawn again; views without a true region are left out. The masks of "
                                   "the data set were read for this count alone. Arms whose second figure is alike hid alike of what matters, whatever they are called.")


def cost(found: Collected, data: str) -> list[dict[str, Any]]:
    """Per arm: mean hidden share, step time, wall times and arithmetic of its finished cells, and the devices."""
    result = []
    for arm in found.arms(data):
        rows = [row for row in found.rows if row["data_set"] == data and row["arm"] == arm and row["status"] == "done"]
        cells = {row["seed"]: row for row in rows}
        tasks = {(row["seed"], row["task"]): row["task_seconds"] for row in rows if row["task_seconds"] is not None}
        result.append({"arm": arm, **{name: _mean(row[name] for row in cells.values()) for name in ("hidden_share", "step_ms", "pretrain_seconds", "encoder_gflop")},
                       "task_seconds": sum(tasks.values()) / len(cells) if tasks else None, "cells": len(cells),
                       "devices": sorted({str(row["device"]) for row in cells.values() if row["device"]}),
                       "commits": sorted({str(row["commit"])[:10] for row in cells.values() if row["commit"]})})
    return result


def _cost(found: Collected, data: str) -> str:
    header = ["arm", "cells", "hidden share, realised", "encoder GFLOP per image", "ms per step", "pre-training, s", "tasks, s", "device", "commit"]
    body = [[f"`{row['arm']}`", str(row["cells"]), _plain(row["hidden_share"], 3), _plain(row["encoder_gflop"], 2), _plain(row["step_ms"], 1), _plain(row["pretrain_seconds"], 0),
             _plain(row["task_seconds"], 0), ", ".join(row["devices"]), ", ".join(row["commits"])] for row in cost(found, data)]
    timed = [(row["arm"], ARMS[row["arm"]].time_of) for row in cost(found, data) if row["arm"] in ARMS and ARMS[row["arm"]].time_of]
    return _table(header, body) + "\n\n" + " ".join((
        "Means over the cells of an arm. GFLOP: the dense encoder's times the visible share, a multiply-add counted as two.",
        *(f"`{name}` takes as many epochs as fit the pre-training time of `{first}`, reckoned fold by fold from the step times of `{first}` and `{second}`."
          for name, (first, second) in timed)))


def _late(late: Mapping[tuple[str, str, str], int]) -> str:
    lines = [f"* `{data}/{arm}`, {TASKS[task]}: came to the configuration when {count} results (cells times tasks) of {data} were there"
             for (data, arm, task), count in late.items()]
    return "\n".join(lines) + ("\n\nWhether somebody had looked at them the command cannot know; a protocol that named these before says so. Contrasts with them are marked.")


def _missing(found: Collected, unfinished: Sequence[str]) -> str:
    lines = [f"* `{data}/{arm}/{seed}` failed: {error}" for data, arm, seed, error in found.failed]
    folds: dict[str, list[str]] = {}
    for name in unfinished:
        data, arm, *fold = name.split("/")  # without a fold where the number of folds is not known yet
        folds.setdefault(f"{data}/{arm}", []).extend(fold)
    lines += [f"* `{arm}`: {_folds(missing)}not run" for arm, missing in folds.items()]
    return "\n".join(lines) or "None."


def _folds(numbers: Sequence[str]) -> str:
    return f"fold{'s' if len(numbers) > 1 else ''} {', '.join(numbers)} " if numbers else ""


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _figure(figure: Estimate, endpoint: str, kind: str) -> str:
    if not math.isfinite(figure.value):
        return "not defined"
    if kind == DESCRIPTIVE or not math.isfinite(figure.low):  # of a single patient there is no interval
        return _number(figure.value, endpoint)
    return f"{_number(figure.value, endpoint)} ({_number(figure.low, endpoint)} to {_number(figure.high, endpoint)})"


def _number(value: float, endpoint: str) -> str:
    return "–" if not math.isfinite(value) else f"{value:.1f}" if endpoint in _LONG else f"{value:.3f}"


def _signed(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:+.3f}".replace("-", "−")


def _p(value: float) -> str:
    return "" if not math.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plain(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)


def as_rows(figures: Sequence[ArmFigure], differences: Sequence[Difference]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The same numbers as plain rows: (arms, contrasts), for CSVs."""
    arms = [{"data_set": row.data, "arm": row.arm, "task": row.task, "endpoint": row.endpoint, "value": row.figure.value,
             "low": row.figure.low if row.kind != DESCRIPTIVE else "", "high": row.figure.high if row.kind != DESCRIPTIVE else "", "fold_low": row.figure.spread[0],
             "fold_high": row.figure.spread[1], "images": row.figure.images, "patients": row.figure.patients, "folds": row.figure.folds, "kind": row.kind} for row in figures]
    contrasts = [{"data_set": row.data, "first": row.first, "second": row.second, "task": row.task, "endpoint": row.endpoint, "difference": row.figure.difference,
                  "low": row.figure.low if row.kind != DESCRIPTIVE else "", "high": row.figure.high if row.kind != DESCRIPTIVE else "",
                  "p": row.figure.p if math.isfinite(row.figure.p) else "", "p_holm": row.p_holm if math.isfinite(row.p_holm) else "",
                  "detectable": row.figure.detectable if row.kind != DESCRIPTIVE else "", "images": row.figure.images, "patients": row.figure.patients,
                  "folds": row.figure.folds, "by_fold": " ".join(f"{fold}:{value:+.4f}" for fold, value in sorted(row.figure.by_fold.items())), "kind": row.kind,
                  "reading": row.verdict} for row in differences]
    return arms, contrasts
