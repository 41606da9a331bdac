"""Pre-train an encoder on unlabelled images: regions from a prompt or from masks, sparse encoding, reconstruction.

  mwm pretrain IMAGES --prompt "both lungs" --out RUN
  mwm pretrain IMAGES --regions REGIONS --encoder convnext_tiny --out RUN --epochs 300
  mwm pretrain --resume --out RUN
  torchrun --nproc-per-node 4 -m mwm pretrain IMAGES --prompt "both lungs" --out RUN

Settings may stand in a YAML file (--config FILE); flags override it. RUN/config.yaml is such a file.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from mwm.cli.flags import add_fields, named_values
from mwm.cli.regions import GEOMETRY, REFINING, add_geometry, add_refining, refining


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of PretrainConfig."""
    from mwm.train.config import PretrainConfig

    add_fields(parser, PretrainConfig, positional=("images",), skip=("read", "mask_settings"))
    parser.add_argument("--mask-setting", dest="mask_settings", metavar="NAME=VALUE", action="append", default=argparse.SUPPRESS,
                        help="a further setting of a policy that --mask names; may be given several times")
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it")
    add_refining(parser)
    add_geometry(parser.add_argument_group("images"))


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Localize where there is a prompt, then train."""
    from mwm.train import PretrainConfig, pretrain
    from mwm.train.heap import keep_freed_memory

    given: dict[str, Any] = vars(options)
    file = given.pop("config", None)
    refine = refining(given)
    for name in REFINING:
        given.pop(name, None)
    if given.get("prompt") is not None and given.get("regions") is not None:
        raise ValueError("pretrain: one of prompt and regions must be given, got both. Leave out --regions to localize the prompt, or --prompt to take the regions.")
    if "mask_settings" in given:
        given["mask_settings"] = named_values(given["mask_settings"], "--mask-setting", "high=0.9")
    geometry = {name: given.pop(name) for name in GEOMETRY if name in given}
    if geometry:
        given["read"] = geometry
    if given.get("resume") and file is None and not given.get("out"):
        raise ValueError("pretrain: out must be the folder of the run to continue, got none. Add --out RUN.")
    if given.get("resume") and file is None and given.get("out"):
        config = PretrainConfig.from_run(given["out"], **given)
    elif file is not None:
        config = PretrainConfig.from_yaml(file, **given)
    else:
        config = PretrainConfig.from_dict(given)
    if refine and (config.regions is not None or config.resume or config.prompt is None):
        flag, found = next(iter(refine)).replace("_", "-"), "no prompt" if config.regions is None and not config.resume else "finished regions"
        raise ValueError(f"pretrain: --{flag} must go with a prompt that is localized now, got {found}. Give it to mwm localize, or add --prompt TEXT.")
    keep_freed_memory()
    out = pretrain(config, localize=lambda settings: localize_for(settings, refine), command=shlex.join(["mwm", *words]))
    if os.environ.get("RANK", "0") == "0":  # under torchrun, one voice
        print(f"\nThe encoder is in {Path(out) / 'encoder.safetensors'}. Next: mwm finetune {shlex.quote(str(out))} LABELLED_IMAGES --task classify")
    return 0


def localize_for(config: Any, refine: dict[str, Any]) -> str:
    """The regions of a run's images, from its prompt, in the folder OUT.regions; what is there already is not computed again."""
    from mwm.data import ReadSettings
    from mwm.localize import run_localize

    out = Path(config.out)
    folder = out.parent / f"{out.name}.regions"
    device = None if config.device == "auto" else config.device
    run_localize(images=config.images, prompt=config.prompt, out=str(folder), localizer=config.localizer, checkpoint=config.localizer_checkpoint,
                 revision=config.localizer_revision, split=config.split, read=ReadSettings(**{"intensity": config.intensity, **config.read}), device=device,
                 strict=config.strict, progress=config.progress, **refine)
    return str(folder)
