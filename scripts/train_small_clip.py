"""Train a small CLIP on captions of modality and anatomy, on a CPU in minutes: a model whose maps follow its text a little, for comparing settings of localizers.

    python scripts/train_small_clip.py DATA OUT [--steps 400]

DATA holds brain_mri/, chest_xray/ and chest_ct/ with their index.csv; only rows of the split "train" are read. OUT becomes a checkpoint of transformers' `CLIPModel`.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIZE, PATCH, WIDTH, DEPTH, HEADS, POSITIONS = 96, 8, 128, 6, 4, 24
MEAN, STD = 0.45, 0.27
NAMES = {
    "brain_mri": {
        "glioma": ["glioma", "a tumour of the brain, glioma", "a large glioma in the brain"],
        "meningioma": ["meningioma", "a tumour of the brain, meningioma", "a meningioma at the edge of the brain"],
        "pituitary_tumor": ["pituitary tumour", "a tumour of the brain, pituitary adenoma", "a pituitary tumour below the brain"],
    },
    "chest_xray": {
        "normal": ["both lungs, normal", "clear lungs of a healthy chest"],
        "bacterial_pneumonia": ["lungs with bacterial pneumonia", "opacity in the lungs, bacterial pneumonia"],
        "viral_pneumonia": ["lungs with viral pneumonia", "opacity in both lungs, viral pneumonia"],
        "covid19": ["lungs with covid pneumonia", "opacity in both lungs, covid"],
    },
    "chest_ct": {
        "normal": ["both lungs, normal", "clear lungs of a healthy chest"],
        "benign": ["lungs with a benign nodule", "a small benign nodule in the lung"],
        "malignant": ["lungs with a malignant tumour", "a cancer of the lung"],
    },
}
MODALITIES = {"brain_mri": ["a brain mri", "mri of the head", "an mri slice of the brain"], "chest_xray": ["a chest x-ray", "a radiograph of the chest", "x-ray of the thorax"],
              "chest_ct": ["a chest ct", "a ct slice of the thorax", "computed tomography of the chest"]}


def caption(kind: tuple[str, str], draw: random.Random) -> str:
    """One wording for a data set and label."""
    return f"{draw.choice(MODALITIES[kind[0]])} showing {draw.choice(NAMES[kind[0]][kind[1]])}"


def read(root: Path, limit: int) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Training images uint8 [N, SIZE, SIZE] and what each shows; at most `limit` of a label."""
    images, kinds = [], []
    for name in NAMES:
        count: dict[str, int] = {}
        with (root / name / "index.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["split"] != "train" or row["label"] not in NAMES[name] or count.get(row["label"], 0) >= limit:
                    continue
                count[row["label"]] = count.get(row["label"], 0) + 1
                with Image.open(root / name / row["file"]) as picture:
                    images.append(np.asarray(picture.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
                kinds.append((name, row["label"]))
    return torch.from_numpy(np.stack(images)), kinds


def tokenizer_of(texts: list[str]) -> object:
    """One token per word of the captions."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.replace(",", " ").split()})
    table = {word: k for k, word in enumerate(["<pad>", "<unk>", *words, "<start>", "<end>"])}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(",", " ")])
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", table["<start>"]), ("<end>", table["<end>"])])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=POSITIONS)


def train(root: Path, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train and save."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    draw = random.Random(seed)
    images, kinds = read(root, 220)
    tokenizer = tokenizer_of([f"{m} showing {n}" for name, labels in NAMES.items() for m in MODALITIES[name] for names in labels.values() for n in names])
    side = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    model = CLIPModel(CLIPConfig(
        text_config={**side, "num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, "bos_token_id": tokenizer.bos_token_id,
                     "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        vision_config={**side, "num_hidden_layers": DEPTH, "image_size": SIZE, "patch_size": PATCH}, projection_dim=WIDTH))
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    began = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(images), (batch,)).tolist()
        pixels = images[rows].float()[:, None] / 255
        shift = torch.randint(-6, 7, (2,)).tolist()
        pixels = pixels.roll(shift, (2, 3)).flip(3) if draw.random() < 0.5 else pixels.roll(shift, (2, 3))
        tokens = tokenizer([caption(kinds[row], draw) for row in rows], padding=True, return_tensors="pt")
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=((pixels - MEAN) / STD).expand(-1, 3, -1, -1)).logits_per_image
        same = torch.tensor([[a == b for b in (kinds[row] for row in rows)] for a in (kinds[row] for row in rows)]).float()  # captions of one label are all right
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            right = torch.gather(same, 1, logits.argmax(1, keepdim=True)).mean()
            print(f"step {step}: loss {float(loss.detach()):.3f}, right label {float(right):.2f}, {time.perf_counter() - began:.0f} s", flush=True)
        if step % 100 == 99 or step == steps - 1:
            model.save_pretrained(out)
            processor.save_pretrained(out)
            tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    train(given.data, given.out, given.steps, given.batch, given.seed)
