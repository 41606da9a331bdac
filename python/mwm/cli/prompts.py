"""Prompt sets: list them, print one, or have a language model write more.

  mwm prompts                                   the sets that come with mwm
  mwm prompts brain_mri_tumour                  its sentences; brain_mri_tumour:P2 those of one level
  mwm prompts brain_mri_tumour:P2 --llm MODEL --count 20 --out more.yaml
  mwm localize IMAGES --prompt-set brain_mri_tumour:P1 ...     mean of the maps of its sentences
  mwm localize IMAGES --prompt-set more.yaml:P2 ...

Levels: P1 names the target in a few words, P2 describes its class in a sentence, P3 its sub-types (P3/glioma). MODEL is a local folder or a
hub name of any text-generation model of transformers. What it writes is filtered by form only: read it before you use it.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set, and how more is written."""
    parser.add_argument("set", metavar="SET", nargs="?", help="name of a set or a .yaml file, with :LEVEL where only one level is meant")
    parser.add_argument("--llm", metavar="MODEL", help="write more sentences of the level (default: P2) with this model: a local folder, or a hub name, which is fetched")
    parser.add_argument("--count", type=int, metavar="N", default=8, help="sentences to write (default: 8)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of the sampling (default: 0)")
    parser.add_argument("--device", metavar="NAME", help="cpu | cuda | cuda:N; default: the first GPU, else the CPU")
    parser.add_argument("--out", metavar="FILE", help="write the new sentences into this .yaml file instead of printing them")


def run(options: argparse.Namespace, words: list[str]) -> int:
    """Print or write."""
    from mwm.localize.prompt_sets import LEVELS, list_prompt_sets, load_prompt_set, resolve_prompts

    if options.set is None:
        if options.llm or options.out:
            raise ValueError("prompts: SET must be given with --llm, got none. Type `mwm prompts brain_mri_tumour:P2 --llm MODEL`.")
        for name in list_prompt_sets():
            found = load_prompt_set(name)
            counts = ", ".join(f"{level} {len(found.sentences(level))}" for level in found.levels)
            print(f"{name:26} {found.title} ({counts})")
        return 0
    found, sentences = resolve_prompts(options.set)
    level = options.set.rpartition(":")[2] if ":" in options.set else ""
    level = level if level.partition("/")[0] in found.levels else ""
    if options.llm is None:
        if options.out:
            raise ValueError("prompts: --out must go with --llm, got it alone. Add --llm MODEL.")
        print("\n".join(sentences) if level else found)
        return 0
    level = level or ("P2" if "P2" in found.levels else next(k for k in LEVELS if k in found.levels))
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and (out.suffix.lower() not in (".yaml", ".yml") or out.exists()):
        raise ValueError(f"prompts: --out must be a new .yaml file, got {options.out!r}. Choose another name.")
    from mwm.localize.prompt_writer import PromptWriter, as_yaml

    written = PromptWriter(options.llm, options.device).write(found, level, options.count, options.seed)
    text = as_yaml(found, level, written, f"{Path(options.llm).name} (seed {options.seed})")
    if out is None:
        print(text, end="")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        print(f"wrote {len(written)} sentences of {level} to {out}; read them, then: mwm localize IMAGES --prompt-set {out}:{level.partition('/')[0]}")
    return 0
