"""Run a study: data sets x arms x folds, pre-training and transfer, and the tables; resumable, and honest about what it compares.

  mwm study studies/cpu.yaml --root DATA --out STUDY
  mwm study studies/cpu.yaml --root DATA --out STUDY --dry-run
  mwm study studies/cpu.yaml --root DATA --out STUDY --masks
  mwm study studies/cpu.yaml --root DATA --out STUDY --budget 2h --workers 2
  mwm study --report --out STUDY
  mwm study --pack CELLS.zip --out STUDY
  mwm study studies/cpu.yaml --root DATA --out OTHER --unpack CELLS.zip

The same command goes on where it was interrupted. STUDY/report holds results.csv, tables and plots. An archive
holds what tables are made from, images and patients as numbers; with the data the study goes on from it on another machine, without it (no
CONFIG) the same tables can be made again.
"""

from __future__ import annotations

import argparse
import re


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The study, and how it is run."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file of the study")
    parser.add_argument("--out", metavar="STUDY", required=True, help="folder of the study; where it exists, the study goes on")
    parser.add_argument("--root", metavar="DATA", default=".", help="folder that the data sets' paths start from (default: this one)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto | cpu | cuda | cuda:N (default: auto)")
    parser.add_argument("--workers", type=int, metavar="N", help="cells at a time (default: 1 on a GPU, else one per two CPU threads)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each worker (default: shared out)")
    parser.add_argument("--budget", type=_seconds, metavar="TIME", help="begin no cell after this time, for example 2h, 90m or 500s; the first cells of the list are kept")
    parser.add_argument("--dry-run", action="store_true", help="time some twenty steps of every kind of cell, print the total, run nothing")
    parser.add_argument("--masks", action="store_true", help="make the regions, print what the masks of each arm would hide of the true regions, train nothing")
    parser.add_argument("--only", metavar="TEXT", default="", help="cells whose name DATA/ARM/FOLD contains this")
    parser.add_argument("--weights", metavar="FILE", help="ImageNet weights for the arm imagenet (safetensors, or a state dict of torch.save)")
    parser.add_argument("--report", action="store_true", help="write the tables of what is done, and run nothing")
    parser.add_argument("--pack", metavar="FILE", help="write what is done into one ZIP without names of images and patients, and run nothing")
    parser.add_argument("--unpack", metavar="FILE", help="put the cells of such a ZIP into STUDY, and run nothing")


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Run or report. Exit code 1 where a cell failed; under torchrun 0, because it would end the other processes in the middle of their cells."""
    import os
    from pathlib import Path

    from mwm.study.archive import pack, unpack
    from mwm.study.command import StudyOptions, folds_of, study, write_report
    from mwm.study.config import StudyConfig

    if sum(map(bool, (options.report, options.pack, options.unpack, options.dry_run, options.masks))) > 1:
        raise ValueError("study: one of --report, --pack, --unpack, --dry-run and --masks must be chosen, got more. Call the command once for each.")
    stored = Path(options.out) / "study.yaml"
    if (options.report or options.pack) and not stored.is_file() and (options.pack or options.config is None):
        raise ValueError(f"study: out must be the folder of a study, got {options.out}, which has no study.yaml. Give {'' if options.pack else 'the CONFIG, or '}another --out.")
    if options.report:
        print(write_report(StudyConfig.from_yaml(options.config or stored), Path(options.out)))
        return 0
    if options.pack:
        print(f"{pack(options.out, options.pack)} cells in {options.pack}")
        return 0
    if options.unpack:
        folds = None if options.config is None else folds_of(StudyConfig.from_yaml(options.config), Path(options.out), Path(options.root))
        put, before = unpack(options.unpack, options.out, folds=folds)
        print(f"{put} cells put into {options.out}{f', {before} were there before' if before else ''}; "
              f"{'the same command without --unpack goes on' if options.config else '--report makes their tables'}")
        return 0
    if options.config is None:
        raise ValueError("study: CONFIG must be a YAML file, got none. Studies of the package are in the folder studies.")
    settings = {name: value for name, value in vars(options).items() if name not in ("config", "report", "pack", "unpack")}
    outcome = study(StudyConfig.from_yaml(options.config), StudyOptions(**settings))
    return 1 if outcome.failed and int(os.environ.get("WORLD_SIZE", 1)) == 1 else 0


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([hms]?)", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"must be a time such as 2h, 90m or 500s, got {text!r}")
    return float(found[1]) * {"h": 3600, "m": 60, "s": 1, "": 1}[found[2]]
