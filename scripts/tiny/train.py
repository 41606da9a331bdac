"""Train the `tiny` localizer: `python scripts/tiny/train.py --data DIR --pseudo PSEUDO` (make PSEUDO with pseudo_masks.py first).

Every step encodes a batch of scans once and asks it for all seven structures, each named by a freshly drawn prompt. Targets of
absent structures are empty. Loss: binary cross-entropy, plus soft Dice where the structure is present, plus cross-entropy of the modality head.
The epoch with the best validation score is kept, with averaged weights (decay 0.998).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from augment import augment, not_a_scan, plain
from prepare import LEFT, RIGHT, TUMOUR, UNKNOWN, Scans, heal, prepare
from prompts import training_prompt
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mwm.localize.tiny_model import TinyModel, prompt_ids
from mwm.localize.tiny_text import STRUCTURES

WEIGHTS = Path(__file__).resolve().parents[2] / "python" / "mwm" / "localize" / "weights" / "tiny.safetensors"
KINDS = {"glioma": 1, "meningioma": 2, "pituitary_tumour": 3}
SHARES = (0.52, 0.28, 0.2)  # of a batch: brain_mri, chest_xray, chest_ct
OTHERS = 3
ABSENT_WEIGHT = 0.15
# Photographs without copyright or CC0, as scikit-image ships them; the ones not named here stay unseen for evaluation.
PHOTOS = ("astronaut", "camera", "rocket", "brick", "grass", "gravel", "hubble_deep_field", "moon", "cell", "chelsea", "coffee", "coins", "retina", "page", "text")


def targets_of(labels: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Target maps of the seven structures and which of them are known.

    Args:
        labels: Label maps. uint8 [B, H, W]
        kind: Kind of tumour or 0. int64 [B]

    Returns:
        float32 [B, 7, H, W]; bool [B, 7]
    """
    left, right, tumour = labels == LEFT, labels == RIGHT, labels == TUMOUR
    maps, known = [], []
    sure = ~(labels == UNKNOWN).flatten(1).any(1)
    for name in STRUCTURES:
        if name in KINDS:
            maps.append(tumour & (kind == KINDS[name])[:, None, None])
        else:
            maps.append({"brain_tumour": tumour, "lungs": left | right, "left_lung": left, "right_lung": right}[name])
        known.append(sure if "lung" in name else torch.ones_like(sure))
    return torch.stack(maps, 1).float(), torch.stack(known, 1)


def loss_of(logits: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy over all known maps, soft Dice where a structure is present, the found share of pixels where it is absent.

    Args:
        logits: [B, P, H, W]
        targets: float32 [B, P, H, W]
        known: Which maps have a known target. bool [B, P]
    """
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((2, 3))
    probability = torch.sigmoid(logits)
    overlap, size, found = (probability * targets).sum((2, 3)), targets.sum((2, 3)), probability.sum((2, 3))
    dice = 1 - (2 * overlap + 5) / (found + size + 5)
    present, absent = known & (size > 12), known & (size == 0)
    # Without this term "glioma" marks every tumour: a wrong kind costs the cross-entropy of a few pixels only.
    false = found / (found + 30)
    return (3 * (entropy * known).sum() / known.sum() + (dice * present).sum() / present.sum().clamp(min=1)
            + (false * absent).sum() / present.sum().clamp(min=1) * ABSENT_WEIGHT)


def load_photos() -> list[np.ndarray]:
    """Photographs that scikit-image ships; none where it is not installed. float32 [H, W, 3] each"""
    try:
        import skimage
        from PIL import Image
    except ImportError:
        return []
    folder = Path(skimage.__file__).parent / "data"
    paths = [p for name in PHOTOS for p in (folder / f"{name}.png", folder / f"{name}.jpg") if p.exists()]
    return [np.asarray(Image.open(p).convert("RGB"), np.float32) / 255 for p in paths]


class Batches(torch.utils.data.IterableDataset):
    """Augmented batches of one epoch, a function of (seed, epoch): images, label maps, kinds, modalities. The last OTHERS images are no scan."""

    def __init__(self, scans: Scans, healed: dict[int, np.ndarray], photos: list[np.ndarray], size: int, seed: int) -> None:
        self.scans, self.healed, self.photos, self.size, self.seed, self.epoch = scans, healed, photos, size, seed, 0
        # Brain slices are the hardest and the fewest: half of each batch, meningiomas, the fewest of them, more often.
        weight = np.array([SHARES[m] for m in scans.modality]) / np.bincount(scans.modality, minlength=3)[scans.modality]
        self.weight = torch.from_numpy(np.where(scans.kind == 2, 1.7, 1.0) * weight)

    def __len__(self) -> int:
        return len(self.weight) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        rng = random.Random(1000 * self.seed + self.epoch)
        images, labels = torch.from_numpy(self.scans.images), torch.from_numpy(self.scans.labels)
        kind, modality = torch.from_numpy(self.scans.kind), torch.from_numpy(self.scans.modality)
        order = torch.multinomial(self.weight, len(self) * self.size, replacement=True, generator=generator)
        for start in range(0, len(self) * self.size, self.size):
            rows = order[start : start + self.size]
            batch_images, batch_labels, batch_kind = images[rows].clone(), labels[rows].clone(), kind[rows].clone()
            for k, row in enumerate(rows.tolist()):
                if row in self.healed and rng.random() < 0.2:
                    batch_images[k], batch_labels[k], batch_kind[k] = torch.from_numpy(self.healed[row]), 0, 0
            x, y = augment(batch_images, batch_labels, modality[rows], generator)
            other = not_a_scan(OTHERS, self.photos, images, generator)
            zero = torch.zeros(OTHERS, dtype=torch.int64)
            yield (torch.cat([x, other]), torch.cat([y, torch.zeros(OTHERS, *y.shape[1:], dtype=y.dtype)]), torch.cat([batch_kind, zero]),
                   torch.cat([modality[rows], zero + 3]))


@torch.no_grad()
def validate(model: TinyModel, scans: Scans) -> dict[str, float]:
    """Mean Dice per structure where present and mean coverage where absent, at the plain prompts."""
    model.eval()
    ids = prompt_ids([prompt for prompt, _ in STRUCTURES.values()])
    images, labels = torch.from_numpy(scans.images), torch.from_numpy(scans.labels)
    kind, modality = torch.from_numpy(scans.kind), torch.from_numpy(scans.modality)
    dice: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    empty: list[float] = []
    right = 0
    for start in range(0, len(images), 32):
        x, y = plain(images[start : start + 32], labels[start : start + 32])
        logits, which = model(x, ids)
        right += int((which[:, :3].argmax(1) == modality[start : start + 32]).sum())
        targets, known = targets_of(y, kind[start : start + 32])
        found = (logits > 0).float()
        score = 2 * (found * targets).sum((2, 3)) / (found.sum((2, 3)) + targets.sum((2, 3))).clamp(min=1)
        present = targets.sum((2, 3)) > 0
        for k, name in enumerate(STRUCTURES):
            dice[name] += score[present[:, k] & known[:, k], k].tolist()
        empty += found.mean((2, 3))[~present & known].tolist()
    result = {name: float(np.mean(values)) for name, values in dice.items()}
    result |= {"absent": float(np.mean(empty)), "modality": right / len(images)}
    result["score"] = float(np.mean([result[n] for n in STRUCTURES])) - 5 * result["absent"]
    return result


def save(model: TinyModel, path: Path, extra: dict[str, str]) -> None:
    """Write the weights as fp16 safetensors."""
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in model.state_dict().items() if "num_batches" not in k}
    save_file(state, str(path), metadata={"format": "pt", "model": "mwm.localize.tiny", **extra})
    path.chmod(0o644)


def main() -> None:
    """Train and write the weights of the best epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds brain_mri/, chest_xray/ and chest_ct/")
    parser.add_argument("--pseudo", type=Path, required=True, help="output folder of pseudo_masks.py")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", type=Path, help="weights to start from")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    train, val = prepare(arguments.data, arguments.pseudo, "train"), prepare(arguments.data, arguments.pseudo, "val")
    healed = {k: h for k in range(len(train.images)) if train.kind[k] and (h := heal(train.images[k], train.labels[k])) is not None}
    print(f"{len(train.images)} training scans, {len(val.images)} validation scans, {len(healed)} slices with a covered tumour", flush=True)
    stream = Batches(train, healed, load_photos(), arguments.batch, arguments.seed)
    model = TinyModel().to(memory_format=torch.channels_last)
    if arguments.init:
        model.load_state_dict({k: v.float() for k, v in load_file(str(arguments.init)).items()}, strict=False)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.02)
    steps = arguments.epochs * len(stream)
    warm = min(100, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))) + 0.003))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    best, step, began = -1.0, 0, time.time()
    for epoch in range(arguments.epochs):
        model.train()
        total = 0.0
        stream.epoch = epoch
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=4)
        for x, labels, kind, truth in loader:
            targets, known = targets_of(labels, kind)
            ids = prompt_ids([training_prompt(name, rng) for name in STRUCTURES])
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits, which = model(x, ids)
            loss = loss_of(logits, targets, known) + 0.2 * F.cross_entropy(which.float(), truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            step += 1
            decay = min(0.998, (step + 1) / (step + 20))
            with torch.no_grad():
                for old, new in pairs:
                    old.lerp_(new, 1 - decay) if old.is_floating_point() else old.copy_(new)
            total += loss.item()
        report = validate(average, val)
        line = {"epoch": epoch, "seconds": round(time.time() - began), "loss": round(total / len(stream), 4)}
        print(json.dumps(line | {k: round(v, 4) for k, v in report.items()}), flush=True)
        if report["score"] > best:
            best = report["score"]
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            save(average, arguments.out, {"epoch": str(epoch), "of": str(arguments.epochs), "seed": str(arguments.seed)})
    print(f"best validation score {best:.4f}, weights in {arguments.out}")


if __name__ == "__main__":
    main()
