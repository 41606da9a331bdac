"""Every CNN of timm and torchvision against the oracle: right, refused (with the reason), or wrong. Wrong must be 0.

    python tests/sparse/sweep_models.py [--all] [--library timm|torchvision] [--match PATTERN] [--out FILE.csv] [--shard 0/2]

By default one net per architecture file and family, the smallest; --all takes every name. A net counts as right when
outputs at visible positions, all gradients of parameters and all running statistics agree in float64, in train and in eval
mode, and no gradient reaches a hidden pixel.
"""

from __future__ import annotations

import argparse
import collections
import csv
import fnmatch
import re
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from comparison import compare, randomise, some_mask

TOLERANCE = 1e-6
LARGEST = 25e6  # parameters above which a net is skipped by default


def names(library: str, everything: bool) -> list[str]:
    """Names of the nets to try, smallest first within a family."""
    if library == "torchvision":
        import torchvision

        found = torchvision.models.list_models(module=torchvision.models)
        return [f"torchvision/{name}" for name in found]
    import timm

    found = timm.list_models()
    if everything:
        return found
    families = collections.OrderedDict()
    for name in found:
        module = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        family = (module, re.match(r"[a-z]+", name).group(0))
        families.setdefault(family, []).append(name)
    chosen = []
    for members in families.values():
        small = [n for n in members if re.search(r"atto|pico|femto|nano|micro|tiny|test_|18|_s0|_0|small|x0|26|27|002|11", n)]
        chosen.append((small or members)[0])
    return chosen


def build(name: str, pyramid: bool) -> torch.nn.Module:
    """The net with random weights; no file is fetched."""
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        import torchvision

        return torchvision.models.get_model(name.partition("/")[2], weights=None)
    import timm

    if pyramid:
        try:
            return timm.create_model(name, pretrained=False, features_only=True)
        except Exception:
            pass
    return timm.create_model(name, pretrained=False)


def judge(name: str, patch: int, modes: tuple[bool, ...]) -> tuple[str, str, float]:
    """(verdict, detail, seconds)"""
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in build(name, pyramid=True).parameters())
        if size > LARGEST and not ALL:
            return "skipped", f"{size / 1e6:.0f} M parameters", 0.0
    except Exception:
        pass
    try:
        net = build(name, pyramid=True)
    except Exception as error:
        return "unbuilt", _line(error), 0.0
    size = sum(p.numel() for p in net.parameters())
    if size > LARGEST and not ALL:
        return "skipped", f"{size / 1e6:.0f} M parameters", 0.0
    for module in net.modules():
        for attribute in ("drop_prob", "p", "drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    net = randomise(net)
    worst, detail = 0.0, ""
    for train in modes:
        try:
            result = compare(net, some_mask(2, 3, 2), channels=3, patch=patch, train=train)
        except (TypeError, ValueError, IndexError, NotImplementedError, RuntimeError, AttributeError, AssertionError, KeyError) as error:
            text = _line(error)
            if patch == 32 and "multiple of 64" in text:
                return judge(name, 64, modes)
            kind = "refused" if type(error).__name__ in ("PackedError", "StrideError") or "mwm" in text or "tile_" in text else "error"
            return kind, f"{type(error).__name__}: {text}", time.perf_counter() - start
        if result.worst > worst:
            worst, detail = result.worst, "; ".join(result.where[:3])
    verdict = "right" if worst <= TOLERANCE else "wrong"
    return verdict, f"{worst:.1e} {detail}", time.perf_counter() - start


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:220]


def main() -> int:
    """Run the sweep; the exit status is the number of wrong nets."""
    global ALL
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--library", choices=("timm", "torchvision"))
    parser.add_argument("--match", default="*")
    parser.add_argument("--out")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--eval-only", action="store_true")
    options = parser.parse_args()
    ALL = options.all
    warnings.simplefilter("ignore")
    shard, shards = map(int, options.shard.split("/"))
    rows = []
    file = open(options.out, "w", newline="") if options.out else None
    for library in [options.library] if options.library else ["torchvision", "timm"]:
        for i, name in enumerate(n for n in names(library, options.all) if fnmatch.fnmatch(n, options.match)):
            if i % shards != shard:
                continue
            verdict, detail, seconds = judge(name, 32, (False,) if options.eval_only else (True, False))
            rows.append(verdict)
            print(f"{verdict:8} {name:40} {seconds:5.1f} s  {detail}", flush=True)
            if file:
                csv.writer(file).writerow([name, verdict, f"{seconds:.1f}", detail])
                file.flush()
    print(dict(collections.Counter(rows)))
    return rows.count("wrong")


ALL = False
if __name__ == "__main__":
    sys.exit(main())
