"""decode="hidden" beside decode="dense": speed of the step, reconstruction of held-out images, a linear probe.

    python -m mwm.bench.study_decode speed [--out FILE]
    python -m mwm.bench.study_decode quality DATA [--seeds 3] [--epochs 12] [--out FILE]
    python -m mwm.bench.study_decode --smoke

`quality` pre-trains a small encoder in both modes from the same weights on the same images, masks and order, and compares: the
loss on held-out images, each model in its own mode; and a linear probe of the encoder's features on held-out patients. DATA is a
folder whose index.csv has the columns file, split (train, val, test), label and patient. --out adds to a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from mwm.bench.encoders import random_active
from mwm.bench.environment import environment

import mwm
from mwm.data import ReadSettings, demo_folder, read_image, read_list
from mwm.mim import MaskedImageModel
from mwm.transfer import linear_probe, recalibrate_batchnorm

MODES = ("dense", "hidden")


def measure_speed(*, encoder: str = "resnet50", hidden: float = 0.6, batch: int = 8, size: int = 224, width: int = 768, bf16: bool = False,
                  pairs: int = 5) -> dict[str, Any]:
    """Median seconds of a step (forward and backward) in both modes, taken in turn, and the median of their ratios."""
    torch.manual_seed(0)
    model = MaskedImageModel(mwm.sparsify(timm.create_model(encoder, features_only=True).train()), decoder_width=width)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    active, visible = random_active(batch, (size // 32, size // 32), hidden)

    def step(mode: str) -> float:
        model.decode = mode
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            loss = model(images, active, visible=visible)
        loss.backward()
        return time.perf_counter() - start

    for mode in MODES:
        step(mode)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(pairs):
        for mode in MODES:
            times[mode].append(step(mode))
    ratios = [dense / ours for dense, ours in zip(times["dense"], times["hidden"], strict=True)]
    return {"encoder": encoder, "hidden": hidden, "batch": batch, "size": size, "decoder_width": width, "precision": "bf16" if bf16 else "fp32",
            "pairs": pairs, **{f"{mode}_s": statistics.median(times[mode]) for mode in MODES}, "dense_over_hidden": statistics.median(ratios),
            "lowest": min(ratios), "highest": max(ratios)}


def load(data: Path, size: int) -> dict[str, dict[str, Any]]:
    """Images, ids, labels and patients by split, standardised by the training images."""
    records = read_list(data / "index.csv")
    splits = {}
    for split in ("train", "val", "test"):
        rows = [r for r in records if r.split == split]
        if not rows:
            raise SystemExit(f"study_decode: DATA must have images of the split {split!r}, got none.")
        images = torch.stack([read_image(r, ReadSettings(size=(size, size)), channels=1) for r in rows])
        splits[split] = {"images": images, "ids": torch.tensor([r.id for r in rows]), "label": [r.label for r in rows],
                         "patient": [r.patient or r.name for r in rows]}
    mean, std = splits["train"]["images"].mean(), splits["train"]["images"].std()
    for part in splits.values():
        part["images"] = (part["images"] - mean) / std
    return splits


def pretrain(mode: str, seed: int, train: dict[str, Any], *, encoder: str, width: int, epochs: int, batch: int, hidden: float,
             rate: float = 1e-3) -> MaskedImageModel:
    """The same first weights, order and masks for every mode."""
    torch.manual_seed(seed)
    model = MaskedImageModel(mwm.sparsify(timm.create_model(encoder, features_only=True, in_chans=1)), decoder_width=width, min_std=0.05, decode=mode).train()
    policy = mwm.create_policy("uniform", overall=hidden)
    images, ids = train["images"], train["ids"]
    grid = (images.shape[2] // 32, images.shape[3] // 32)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(1, steps), pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(batch):
            if len(rows) < batch:
                continue
            active = policy(None, grid=grid, seed=seed, ids=ids[rows], epoch=epoch)
            loss = model(images[rows], active, visible=policy.visible(grid))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def held_out_loss(model: MaskedImageModel, part: dict[str, Any], hidden: float, *, draws: int = 4) -> float:
    """Loss in evaluation mode, over the same masks for every model; the model's own way of decoding."""
    policy = mwm.create_policy("uniform", overall=hidden)
    grid = (part["images"].shape[2] // 32, part["images"].shape[3] // 32)
    total = count = 0.0
    model.eval()
    for draw in range(draws):
        for images, ids in zip(part["images"].split(32), part["ids"].split(32), strict=True):
            terms = model(images, policy(None, grid=grid, seed=10_000, ids=ids, epoch=draw), reduction="sum")
            total, count = total + float(terms.total), count + float(terms.hidden)
    return total / count


@torch.no_grad()
def probe(model: MaskedImageModel, splits: dict[str, dict[str, Any]], seed: int) -> float:
    """AUROC on the test patients of a logistic regression on the pooled deepest map, fitted on the training patients."""
    names = sorted(set(splits["train"]["label"]))
    labels = {split: np.array([names.index(label) for label in splits[split]["label"]]) for split in ("train", "test")}
    recalibrate_batchnorm(model.net, splits["train"]["images"].split(32))
    features = {split: torch.cat([model.net(part)[-1].mean((2, 3)) for part in splits[split]["images"].split(32)]).numpy() for split in ("train", "test")}
    result = linear_probe(features["train"], labels["train"], features["test"], labels["test"], splits["test"]["patient"],
                          groups_fit=splits["train"]["patient"], rounds=200, seed=seed)
    return result.auroc


def measure_quality(data: Path, *, seeds: int, epochs: int, size: int = 128, encoder: str = "resnet18", width: int = 128, batch: int = 16,
                    hidden: float = 0.6, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Both modes and the untrained encoder, seed by seed."""
    splits = load(data, size)
    rows = []
    for seed in range(seeds):
        for mode in (*MODES, "untrained"):
            model = pretrain("dense" if mode == "untrained" else mode, seed, splits["train"], encoder=encoder, width=width,
                             epochs=0 if mode == "untrained" else epochs, batch=batch, hidden=hidden)
            row = {"seed": seed, "mode": mode, "held_out_loss": None if mode == "untrained" else held_out_loss(model, splits["val"], hidden),
                   "probe_auroc": probe(model, splits, seed)}
            rows.append(row)
            report(json.dumps(row))
    return {"data": data.name, "images": {split: len(part["images"]) for split, part in splits.items()}, "size": size, "encoder": encoder,
            "decoder_width": width, "epochs": epochs, "batch": batch, "hidden": hidden, "rows": rows}


def smoke() -> dict[str, Any]:
    """Everything once, tiny: sixteen shipped X-rays dealt to splits, two classes, two images a patient."""
    with tempfile.TemporaryDirectory() as folder:
        names = sorted(path for path in (demo_folder() / "chest_xray").glob("*.jpg"))[:24]
        rows = [f"{path.name},{('train', 'train', 'val', 'test')[i // 2 % 4]},{'ab'[i % 2]},p{i}" for i, path in enumerate(names)]
        for path in names:
            (Path(folder) / path.name).write_bytes(path.read_bytes())
        (Path(folder) / "index.csv").write_text("\n".join(["file,split,label,patient", *rows]) + "\n")
        quality = measure_quality(Path(folder), seeds=1, epochs=1, size=64, encoder="resnet10t", width=32, batch=4, report=lambda _: None)
    return {"speed": [measure_speed(encoder="resnet10t", batch=2, size=64, width=32, pairs=1)], "quality": [{**quality, "data": "smoke"}]}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("speed", "quality"))
    parser.add_argument("data", nargs="?", type=Path, help="folder with images and index.csv")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--hidden", type=float, nargs="+", default=[0.6], help="shares of the patches")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to add to")
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny, to see that it runs")
    options = parser.parse_args(argv)
    if options.smoke:
        found = smoke()
    elif options.part == "speed":
        found = {"speed": [measure_speed(hidden=share, bf16=bf16, pairs=options.pairs) for share in options.hidden for bf16 in (False, True)]}
    elif options.part == "quality" and options.data is not None:
        if not (options.data / "index.csv").is_file():
            raise SystemExit(f"study_decode: DATA must hold an index.csv, got {options.data.name}. The study is skipped without it.")
        found = {"quality": [measure_quality(options.data, seeds=options.seeds, epochs=options.epochs, hidden=options.hidden[0])]}
    else:
        parser.error("give speed, or quality DATA, or --smoke")
    for name, rows in found.items():
        found[name] = [{**row, "environment": environment()} for row in rows]
    print(json.dumps(found, indent=1))
    if options.out:
        before = json.loads(options.out.read_text()) if options.out.is_file() else {}
        options.out.write_text(json.dumps({**before, **{name: [*before.get(name, []), *rows] for name, rows in found.items()}}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
