"""What the tables and plots of a study show: estimates of every arm, and contrasts with the protocol's rules applied."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mwm.study import sources
from mwm.study.collect import Collected
from mwm.study.endpoints import ENDPOINTS, Answers
from mwm.study.errors import StudyError
from mwm.study.statistics import ROUNDS, Contrast, Estimate, compare, contrast, estimate, estimate_of, holm

SHORTCUT = "shortcut"
PRIMARY, EXPLORATORY, DESCRIPTIVE = "primary", "exploratory", "descriptive"
SHOWN = {"classify": ("auroc", "accuracy", "balanced_accuracy", "macro_f1"), "probe": ("auroc", "accuracy", "balanced_accuracy", "macro_f1"),
         "segment": ("dice", "iou", "nsd", "hd95"), "detect": ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")}
"""Endpoints of the tables, by task."""
COMPARED = {"classify": ("auroc", "accuracy"), "probe": ("auroc",), "segment": ("dice",), "detect": ("box_ap", "mask_ap")}
"""Endpoints of the contrasts, by task; of data sets that are only described, the first."""
_FOLDS = 0.8  # share of the folds that a contrast needs before it is more than a description


@dataclass(frozen=True)
class Plan:
    """What the protocol fixed.

    Attributes:
        primary: The pair of arms of the primary contrast, first minus second.
        primary_endpoints: Task and endpoint by data set; other data sets have no primary contrast.
        contrasts: Exploratory pairs of arms; pairs with an arm that was not run are left out.
        effects: Smallest effect of interest by endpoint.
        descriptive: Data sets that are only described, beside those whose folds say so.
    """

    primary: tuple[str, str] = ("region", "shuffled")
    primary_endpoints: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {"brain_mri": ("segment", "dice"), "chest_xray": ("classify", "auroc")})
    contrasts: tuple[tuple[str, str], ...] = (
        ("region", "uniform"), ("region", "foreground"), ("region", "scratch"), ("uniform", "scratch"), ("region", "scratch_long"), ("roi", "region"), ("roi", "uniform"),
        ("weighted", "uniform"), ("edges", "uniform"), ("region", "uniform60"), ("region", "uniform60_time"), ("region", "uniform70"), ("region", "region70_30"),
        ("region", "region60_20"), ("region", "imagenet"))
    effects: Mapping[str, float] = field(default_factory=lambda: {"auroc": 0.02, "dice": 0.02, "box_ap": 0.01, "mask_ap": 0.01})
    descriptive: tuple[str, ...] = ("chest_ct",)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, data: Collection[str] | None = None) -> Plan:
        """From the section `analysis` of a study's YAML; what it leaves out is the protocol's.

        Args:
            values: The section.
            data: Names of the study's data sets, of which `values` may speak; None where they are not known.

        Raises:
            StudyError: an unknown name, or a value of another form.
        """
        try:
            plan = cls._made(dict(values or {}))
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, StudyError):
                raise
            raise StudyError(f"study: analysis must hold pairs of arms, effects by endpoint and primary endpoints by data set, got values of another form ({error}).") from error
        for pair in (plan.primary, *plan.contrasts):
            if len(set(pair)) != 2 or len(pair) != 2:
                raise StudyError(f"study: contrasts must be pairs of arms [first, second], got {list(pair)}.")
            for name in pair:
                sources.arm(name)
        for task, endpoint in plan.primary_endpoints.values():
            # Of what is not contrasted the tables would show no primary contrast at all.
            if endpoint not in COMPARED.get(task, ()):
                known = ", ".join(f"{name}/{one}" for name, own in COMPARED.items() for one in own)
                raise StudyError(f"study: primary_endpoints must be among {known}, got {task}/{endpoint}.")
        for endpoint, effect in plan.effects.items():
            if not any(endpoint in own for own in COMPARED.values()) or not 0 < effect < math.inf:
                raise StudyError(f"study: effects must be positive numbers by endpoint ({', '.join(sorted({one for own in COMPARED.values() for one in own}))}), got "
                                 f"{endpoint}: {effect}.")
        strangers = sorted({*(values or {}).get("primary_endpoints", ()), *(values or {}).get("descriptive", ())} - set(data)) if data is not None else []
        if strangers:
            raise StudyError(f"study: analysis must speak of the study's data sets, {', '.join(data)}, got {strangers[0]!r}.")
        return plan

    @classmethod
    def _made(cls, values: dict[str, Any]) -> Plan:
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise StudyError(f"study: analysis must have the settings {', '.join(cls.__dataclass_fields__)}, got {unknown[0]!r}.")
        made: dict[str, Any] = {}
        for name in ("primary", "descriptive"):
            if name in values:
                if not isinstance(values[name], (list, tuple)) or not all(isinstance(one, str) for one in values[name]):
                    raise StudyError(f"study: analysis.{name} must be a list of names, got {values[name]!r}.")
                made[name] = tuple(values[name])
        if "contrasts" in values:
            made["contrasts"] = tuple(tuple(map(str, pair)) for pair in values["contrasts"])
        if "primary_endpoints" in values:
            made["primary_endpoints"] = {data: _endpoint(text) for data, text in values["primary_endpoints"].items()}
        if "effects" in values:
            made["effects"] = {name: float(value) for name, value in values["effects"].items()}
        return cls(**made)


def _endpoint(text: Any) -> tuple[str, str]:
    parts = tuple(text) if isinstance(text, (list, tuple)) else tuple(str(text).split("/"))
    if len(parts) != 2:
        raise StudyError(f"study: primary_endpoints must be TASK/ENDPOINT such as segment/dice, got {text!r}.")
    return parts


@dataclass(frozen=True)
class ArmFigure:
    """One endpoint of one arm. `kind` is exploratory or descriptive, as in contrasts; primary where the endpoint is."""

    data: str
    arm: str
    task: str
    endpoint: str
    figure: Estimate
    kind: str


@dataclass(frozen=True)
class Difference:
    """One contrast: arms, kind, the figures, Holm's p over the exploratory contrasts of the data set, and what it says."""

    data: str
    first: str
    second: str
    task: str
    endpoint: str
    kind: str
    figure: Contrast
    p_holm: float
    verdict: str


def figures(found: Collected, plan: Plan, *, shortcuts: Mapping[str, Answers] | None = None, rounds: int = ROUNDS) -> list[ArmFigure]:
    """Every endpoint of every arm, the shortcut row last.

    Args:
        found: Collected cells.
        plan: Of the protocol.
        shortcuts: Answers of the shortcut classifier by data set.
        rounds: Bootstrap draws.
    """
    result = []
    for data in sorted(found.folds):
        for arm in found.arms(data):
            for task, endpoints in SHOWN.items():
                for endpoint in endpoints:
                    figure = _estimate(found, data, arm, task, endpoint, rounds)
                    if figure is not None:
                        result.append(ArmFigure(data, arm, task, endpoint, figure, _kind(found, plan, data, task, endpoint)))
        if shortcuts and data in shortcuts and any(task in ("classify", "probe") for _, _, task, _ in _keys(found, data)):
            result += [ArmFigure(data, SHORTCUT, "classify", endpoint, estimate(shortcuts[data], endpoint, rounds=rounds), _kind(found, plan, data, "classify", endpoint))
                       for endpoint in ENDPOINTS]
    return result


def _keys(found: Collected, data: str) -> list[tuple[str, str, str, str]]:
    return [key for key in found.answers if key[0] == data]


def _estimate(found: Collected, data: str, arm: str, task: str, endpoint: str, rounds: int) -> Estimate | None:
    answers = found.answers.get((data, arm, task, "" if endpoint in ENDPOINTS else endpoint))
    if answers is not None:
        return estimate(answers, endpoint, rounds=rounds)
    boxes = found.detections.get((data, arm)) if task == "detect" else None
    if boxes is None or endpoint not in boxes.endpoints:
        return None
    each = {fold: float(boxes.only([fold]).statistic(endpoint)(np.ones((1, len(boxes.only([fold]).patients))))[0]) for fold in boxes.folds}
    return estimate_of(boxes.statistic(endpoint), patients=len(boxes.patients), images=boxes.images, by_fold=each, rounds=rounds)


def _kind(found: Collected, plan: Plan, data: str, task: str, endpoint: str) -> str:
    if _described(found, plan, data):
        return DESCRIPTIVE
    return PRIMARY if plan.primary_endpoints.get(data) == (task, endpoint) else EXPLORATORY


def _described(found: Collected, plan: Plan, data: str) -> bool:
    return data in plan.descriptive or found.folds[data].descriptive


def differences(found: Collected, plan: Plan, *, rounds: int = ROUNDS) -> list[Difference]:
    """All contrasts of the plan whose arms were run, the primary one of each data set first.

    A contrast of a descriptive data set, or of fewer than 80 % of the folds, has no p value. Holm's correction runs over the
    exploratory contrasts of a data set; the primary one is left alone.
    """
    result: list[Difference] = []
    for data in sorted(found.folds):
        held, arms = [], found.arms(data)
        # A pair in both directions is one question, and would count twice in Holm's correction.
        wanted = [pair for pair in dict.fromkeys((plan.primary, *plan.contrasts)) if set(pair) <= set(arms) and pair != plan.primary[::-1]]
        for first, second in wanted:
            for task, endpoints in COMPARED.items():
                for endpoint in endpoints[:1] if _described(found, plan, data) else endpoints:
                    figure = _contrast(found, data, first, second, task, endpoint, rounds)
                    if figure is None:
                        continue
                    kind = _kind(found, plan, data, task, endpoint)
                    if kind == PRIMARY and (first, second) != plan.primary:
                        kind = EXPLORATORY
                    if figure.folds < _FOLDS * len(found.folds[data].test):
                        kind = DESCRIPTIVE
                    if kind == DESCRIPTIVE:
                        figure = replace(figure, p=math.nan)
                    held.append(Difference(data, first, second, task, endpoint, kind, figure, math.nan, ""))
        tested = [k for k, row in enumerate(held) if row.kind == EXPLORATORY]
        for k, adjusted in zip(tested, holm([held[k].figure.p for k in tested]), strict=True):
            held[k] = replace(held[k], p_holm=adjusted)
        held = [replace(row, verdict=_verdict(row, plan.effects.get(row.endpoint))) for row in held]
        result += sorted(held, key=lambda row: row.kind != PRIMARY)
    return result


def _contrast(found: Collected, data: str, first: str, second: str, task: str, endpoint: str, rounds: int) -> Contrast | None:
    name = "" if endpoint in ENDPOINTS else endpoint
    one, other = (found.answers.get((data, arm, task, name)) for arm in (first, second))
    if one is not None and other is not None:
        return contrast(one, other, endpoint, rounds=rounds) if _shared(one.fold.tolist(), other.fold.tolist()) else None
    a, b = (found.detections.get((data, arm)) if task == "detect" else None for arm in (first, second))
    if a is None or b is None or endpoint not in a.endpoints or endpoint not in b.endpoints:
        return None
    shared = _shared(a.folds, b.folds)
    if not shared:
        return None
    a, b = a.only(shared), b.only(shared)
    if any(a.folds[fold].patient != b.folds[fold].patient for fold in shared):
        raise StudyError(f"contrast: {first} and {second} must answer the same images of each fold of {data}, got others. Collect both arms from one study.")
    by_fold = {}
    for fold in shared:
        ones = np.ones((1, len(a.only([fold]).patients)))
        by_fold[fold] = float(a.only([fold]).statistic(endpoint)(ones)[0] - b.only([fold]).statistic(endpoint)(ones)[0])
    return compare(a.statistic(endpoint), b.statistic(endpoint), patients=len(a.patients), images=a.images, by_fold=by_fold, rounds=rounds)


def _shared(first: Iterable[int], second: Iterable[int]) -> list[int]:
    return sorted(set(first) & set(second))


def _verdict(row: Difference, effect: float | None) -> str:
    """In the protocol's words; never "no difference"."""
    figure = row.figure
    if row.kind == DESCRIPTIVE or not math.isfinite(figure.low):
        return "described only"
    if figure.low > 0 or figure.high < 0:
        if row.kind == EXPLORATORY and not row.p_holm < 0.05:
            return "not decided after correction"
        small = effect is not None and max(abs(figure.low), abs(figure.high)) < effect
        return f"{row.first if figure.low > 0 else row.second} higher{', below the effect of interest' if small else ''}"
    if effect is not None and -effect < figure.low and figure.high < effect:
        return "equivalent in practice"
    return "not decided"
