"""Measure the shipped `tiny` on the test splits: `python scripts/tiny/evaluate.py --data DIR --pseudo PSEUDO`.

Writes tiny_metrics.json and the tables between the marks of tiny_card.md, both beside the weights. Every figure comes from
`TinyLocalizer` itself, at the size of the image files, with heat >= 0.5 as found. Non-commercial sets are read for evaluation only.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prepare import LEFT, RIGHT, TUMOUR, read_label, read_pseudo, read_rows
from prompts import HELD_OUT
from scipy import ndimage
from train import PHOTOS

from mwm.localize.tiny import WEIGHTS, TinyLocalizer
from mwm.localize.tiny_text import STRUCTURES

KIND = {"glioma": "glioma", "meningioma": "meningioma", "pituitary_tumor": "pituitary_tumour"}
SETS = ("brain_mri", "chest_xray", "chest_ct")


def load(path: Path) -> torch.Tensor:
    """float32 [1, 1, H, W] in [0, 1]"""
    return torch.from_numpy(np.asarray(Image.open(path).convert("L"), np.float32) / 255)[None, None]


def target_of(name: str, label: np.ndarray, kind: str) -> np.ndarray:
    """Truth of a structure on one label map. bool [H, W]"""
    if name in KIND.values():
        return (label == TUMOUR) & (KIND.get(kind) == name)
    return {"brain_tumour": label == TUMOUR, "lungs": (label == LEFT) | (label == RIGHT), "left_lung": label == LEFT,
            "right_lung": label == RIGHT}[name]


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks, truth not empty."""
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def interval(values: list[float], groups: list[str], rng: np.random.Generator) -> list[float]:
    """Mean and 95 % interval of a bootstrap over patients (blocks of slices where ids are not published)."""
    by_group: dict[str, list[float]] = defaultdict(list)
    for value, group in zip(values, groups, strict=True):
        by_group[group].append(value)
    sums = np.array([[sum(v), len(v)] for v in by_group.values()])
    picks = rng.integers(0, len(sums), (2000, len(sums)))
    draws = sums[picks].sum(1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], [0.025, 0.975])
    return [float(np.mean(values)), float(low), float(high), len(values), len(sums)]


def summary(rows: dict[str, list[tuple[float, str]]], rng: np.random.Generator) -> dict[str, list[float]]:
    """Interval per key."""
    return {key: interval([v for v, _ in pairs], [g for _, g in pairs], rng) for key, pairs in rows.items() if pairs}


def measure(data: Path, pseudo_folder: Path, split: str) -> dict[str, object]:
    """All figures of one split."""
    localizer = TinyLocalizer("cpu")
    pseudo = read_pseudo(pseudo_folder)
    rng = np.random.default_rng(0)
    rows: dict[str, dict[str, list[tuple[float, str]]]] = {k: defaultdict(list) for k in ("dice", "paraphrase", "absent", "kind_absent", "side")}
    refused: list[str] = []
    for dataset in SETS:
        for count, row in enumerate(read_rows(data, dataset, split)):
            label, image, patient = read_label(data, dataset, row, pseudo), load(data / dataset / row["file"]), row["patient"]
            prompts = {name: prompt for name, (prompt, _) in STRUCTURES.items()}
            try:
                maps = localizer.compare(image, [*prompts.values(), *(sentences[count % len(sentences)] for sentences in HELD_OUT.values())]).numpy() >= 0.5
            except ValueError:
                refused.append(f"{dataset}/{row['file']}")
                continue
            found, other_words = dict(zip(prompts, maps, strict=False)), dict(zip(HELD_OUT, maps[len(prompts) :], strict=True))
            for name, mask in found.items():
                other = ("lung" in name) == (dataset == "brain_mri")
                if other:
                    rows["absent"][f"{prompts[name]} on {dataset}"].append((float(mask.mean()), patient))
                elif dataset == "brain_mri" and name != "brain_tumour" and KIND[row["label"]] != name:
                    rows["kind_absent"][f"{prompts[name]} on a {KIND[row['label']]}"].append((float(mask.mean()), patient))
                elif label is not None:
                    truth = target_of(name, label, row["label"])
                    if not truth.any():
                        continue
                    rows["dice"][f"{prompts[name]} on {dataset}"].append((dice(mask, truth), patient))
                    rows["paraphrase"][f"{prompts[name]} on {dataset}"].append((dice(other_words[name], truth), patient))
                    if name in ("left_lung", "right_lung"):
                        wrong = target_of("right_lung" if name == "left_lung" else "left_lung", label, "")
                        rows["side"][f"{prompts[name]} on {dataset}"].append((float((mask & wrong).sum() / max(1, wrong.sum())), patient))
    result: dict[str, object] = {"fingerprint": localizer.fingerprint} | {key: summary(value, rng) for key, value in rows.items()}
    everything = [pair for pairs in rows["absent"].values() for pair in pairs]
    result["other anatomy"] = interval([v for v, _ in everything], [g for _, g in everything], rng)
    result["refused"] = len(refused)
    return result


def each_paraphrase(data: Path, pseudo_folder: Path, split: str) -> dict[str, float]:
    """Mean Dice of every single held-out paraphrase on some 60 scans of each set, where its structure is present."""
    localizer = TinyLocalizer("cpu")
    pseudo = read_pseudo(pseudo_folder)
    scores: dict[str, list[float]] = defaultdict(list)
    for dataset in SETS:
        rows = read_rows(data, dataset, split)
        rows = read_rows(data, dataset, split)
        for row in rows[:: max(1, len(rows) // 60)]:
            label = read_label(data, dataset, row, pseudo)
            if label is None:
                continue
            image = load(data / dataset / row["file"])
            for name, sentences in HELD_OUT.items():
                truth = target_of(name, label, row["label"])
                if truth.any():
                    for sentence, heat in zip(sentences, localizer.compare(image, sentences).numpy(), strict=True):
                        scores[f"{name}: {sentence}"].append(dice(heat >= 0.5, truth))
    return {key: float(np.mean(values)) for key, values in scores.items()}


def other_sets(data: Path) -> dict[str, list[float]]:
    """Evaluation-only sets: FLAIR slices with and without tumour (non-commercial, never trained on)."""
    localizer, rng = TinyLocalizer("cpu"), np.random.default_rng(0)
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    with (data / "brain_mri_lgg_nc" / "index.csv").open() as stream:
        records = [r for r in csv.DictReader(stream) if r["split"] == "test"]
    for row in records:
        image = load(data / "brain_mri_lgg_nc" / row["file"])
        try:
            found = localizer(image, ["brain tumour"])[0].numpy() >= 0.5
        except ValueError:
            rows["refused"].append((1.0, row["patient"]))
            continue
        rows["refused"].append((0.0, row["patient"]))
        if row["mask"]:
            truth = np.asarray(Image.open(data / "brain_mri_lgg_nc" / row["mask"]).convert("L")) > 127
            rows["dice, brain tumour on FLAIR with glioma"].append((dice(found, truth), row["patient"]))
            rows["share of tumours with a pixel found"].append((float(found[_box(truth)].any()), row["patient"]))
        else:
            rows["coverage, brain tumour on tumour-free FLAIR slices"].append((float(found.mean()), row["patient"]))
            rows["share of tumour-free slices with any pixel found"].append((float(found.any()), row["patient"]))
    return summary(rows, rng)


def photographs() -> dict[str, bool]:
    """Whether photographs that training did not see, as grey images, are refused; empty where the packages that ship them are absent."""
    try:
        import skimage
        import sklearn
    except ImportError:
        return {}
    localizer, answers = TinyLocalizer("cpu"), {}
    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    for path in sorted(p for folder in folders for p in folder.iterdir() if p.suffix in {".png", ".jpg"}):
        if path.stem not in PHOTOS:
            answers[path.stem] = localizer.modality(load(path))[0] == "other"
    return answers


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    return ndimage.find_objects(mask.astype(np.int8))[0]


def table(title: str, rows: dict[str, list[float]], *, percent: bool = False) -> str:
    """Markdown table of mean, interval, n."""
    scale, digits = (100, 2) if percent else (1, 3)
    lines = [f"| {title} | mean{' %' if percent else ''} | 95 % interval | scans | patients or blocks |", "|---|---|---|---|---|"]
    lines += [f"| {key} | {v[0] * scale:.{digits}f} | {v[1] * scale:.{digits}f} – {v[2] * scale:.{digits}f} | {v[3]} | {v[4]} |" for key, v in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, write the JSON, fill the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pseudo", type=Path, required=True)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.data, arguments.pseudo, arguments.split)
    result["every paraphrase"] = each_paraphrase(arguments.data, arguments.pseudo, arguments.split)
    if arguments.split == "test":
        result["lgg"] = other_sets(arguments.data)
        result["photographs refused"] = photographs()
    print(json.dumps(result, indent=1))
    if arguments.split != "test":
        return
    (WEIGHTS.parent / "tiny_metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    free = "coverage, brain tumour on tumour-free FLAIR slices"
    absence = {"other anatomy (every wrong modality x structure)": result["other anatomy"],
               "tumour prompt on tumour-free slices (brain_mri_lgg_nc, evaluation only)": result["lgg"][free]}
    photos = result["photographs refused"]
    tables = [table("Dice", result["dice"]), table("Absence: coverage", absence, percent=True), table("Dice, held-out paraphrases", result["paraphrase"]),
              table("Coverage, other anatomy", result["absent"], percent=True),
              table("Coverage, another kind of tumour", result["kind_absent"], percent=True),
              table("Share of the other lung covered", result["side"], percent=True),
              table("FLAIR set (evaluation only)", result["lgg"]), f"Test scans refused as no known modality: {result['refused']}. "
              f"Grey photographs and drawings never seen in training that are refused: "
              f"{sum(photos.values())} of {len(photos)} (not: {', '.join(k for k, v in photos.items() if not v) or 'none'})."]
    lines = ["| held-out paraphrase | Dice |", "|---|---|"] + [f"| {k} | {v:.3f} |" for k, v in result["every paraphrase"].items()]
    card = WEIGHTS.parent / "tiny_card.md"
    head, rest = card.read_text().split("<!-- figures -->")
    tail = rest.split("<!-- end of figures -->")[1]
    body = "\n\n".join([*tables, "\n".join(lines)])
    card.write_text(f"{head}<!-- figures -->\n{body}\n<!-- end of figures -->{tail}")


if __name__ == "__main__":
    main()
