"""Fine-tune a localizer: the head of a CLIPSeg on masks, or the towers of a CLIP-like model on captions.

  mwm localize train IMAGES MASKS --prompt "both lungs" --checkpoint clipseg-rd64 --out lungs
  mwm localize train index.csv --prompt-set brain_mri_tumour:P2 --checkpoint FOLDER --out tumours      masks from the CSV's column mask
  mwm localize train captions.csv --checkpoint clip-vit-b16 --out towers                               captions from the column caption, else prompt

OUT is a checkpoint folder: `mwm localize IMAGES --localizer clipseg (or bottleneck) --checkpoint OUT`. Rows of the split test are never read. MASKS are labels: OUT says so,
and so does every folder of regions that is made with it (supervised region source). One process, not under torchrun.

A training that was killed goes on from OUT.unfinished with the same command and --resume, bit for bit on the CPU, as often as it takes; a finished one is left as it is.
"""

from __future__ import annotations

import argparse

from mwm.cli.regions import add_geometry, add_root, reading

_SETTINGS = ("epochs", "batch_size", "lr", "weight_decay", "absent_share", "temperature", "beta_image", "beta_text", "val_share", "seed", "precision", "workers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, checkpoint, texts, training."""
    parser.add_argument("images", metavar="IMAGES", help="folder, glob, text list or index CSV")
    parser.add_argument("masks", metavar="MASKS", nargs="?", default=argparse.SUPPRESS, help="folder of masks named like the images (default: the CSV's column mask)")
    parser.add_argument("--checkpoint", metavar="NAME", default=argparse.SUPPRESS, help="what to begin with: preset, hub name or folder (default: clipseg-rd64)")
    parser.add_argument("--revision", metavar="COMMIT", default=argparse.SUPPRESS,
                        help="commit, branch or tag of the checkpoint's hub name (default: the one that a preset pins, else the newest)")
    parser.add_argument("--out", metavar="FOLDER", default=argparse.SUPPRESS, help="new folder of the trained checkpoint (default: localizer)")
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=argparse.SUPPRESS, help="text of the target; may be given several times")
    parser.add_argument("--prompt-set", metavar="NAME[:LEVEL]", default=argparse.SUPPRESS, help="texts of the target from a prompt set")
    parser.add_argument("--absent", metavar="TEXT", action="append", default=argparse.SUPPRESS, help="text about what the images do not show; may be given several times")
    parser.add_argument("--device", metavar="NAME", default=argparse.SUPPRESS, help="cpu | cuda | cuda:N; default: the first GPU, else the CPU")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, metavar="N", default=argparse.SUPPRESS, help="rounds over the images (default: 20)")
    group.add_argument("--batch-size", type=int, metavar="N", default=argparse.SUPPRESS, help="images of a step (default: 16 for a head, 64 for towers)")
    group.add_argument("--lr", type=float, metavar="X", default=argparse.SUPPRESS, help="peak learning rate (default: 1e-3 for a head, 1e-6 for towers)")
    group.add_argument("--weight-decay", type=float, metavar="X", default=argparse.SUPPRESS, help="of AdamW (default: 0.01)")
    group.add_argument("--absent-share", type=float, metavar="X", default=argparse.SUPPRESS, help="head: share shown with a text about something absent (default: 0.25)")
    group.add_argument("--temperature", type=float, metavar="X", default=argparse.SUPPRESS, help="towers: of DHN-NCE (default: 0.6)")
    group.add_argument("--beta-image", type=float, metavar="X", default=argparse.SUPPRESS, help="towers: hardness, image to text (default: 0.15)")
    group.add_argument("--beta-text", type=float, metavar="X", default=argparse.SUPPRESS, help="towers: hardness, text to image (default: 0.15)")
    group.add_argument("--val-share", type=float, metavar="X", default=argparse.SUPPRESS, help="patients that choose the epoch, where the CSV has no split val (default: 0.15)")
    group.add_argument("--seed", type=int, metavar="N", default=argparse.SUPPRESS, help="of order, texts and split (default: 0)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default=argparse.SUPPRESS, help="of matrix products; weights stay float32 (default: fp32)")
    group.add_argument("--resume", action="store_true", default=argparse.SUPPRESS, help="go on with a training that was killed")
    group.add_argument("--checkpoint-minutes", type=float, metavar="N", default=argparse.SUPPRESS, help="at least so long between two checkpoints (default: 10)")
    group.add_argument("--workers", type=int, metavar="N", default=argparse.SUPPRESS, help="threads that read images (default: 2)")
    images = parser.add_argument_group("images")
    images.add_argument("--split", metavar="NAME", default=argparse.SUPPRESS, help="take only rows of this split of an index CSV")
    add_root(images)
    images.add_argument("--intensity", metavar="TEXT", default=argparse.SUPPRESS, help="auto | percentile | window=C,W | minmax (default: auto)")
    add_geometry(images)


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Train, save, print."""
    from mwm.localize.prompt_sets import resolve_prompts
    from mwm.localize.train import TrainSettings, train_localizer
    from mwm.train import checkpoint

    given = vars(options)
    chosen, sentences = resolve_prompts(given["prompt_set"]) if "prompt_set" in given else (None, [])
    absent = given.get("absent") or ([chosen.absent] if chosen and chosen.absent else [])
    print(train_localizer(
        given["images"], given.get("masks"), out=given.get("out", "localizer"), prompts=[*given.get("prompt", []), *sentences], absent=absent,
        settings=TrainSettings(**{name: given[name] for name in _SETTINGS if name in given}), read=reading(given), split=given.get("split"), root=given.get("root"),
        device=given.get("device"),
        checkpoints=checkpoint, **{name: given[name] for name in ("checkpoint", "revision", "resume", "checkpoint_minutes") if name in given}))
    return 0
