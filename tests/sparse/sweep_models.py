"""Every CNN of timm and net of torchvision against the oracle: right, refused (with the reason), wrong or error. The last two must be 0.

    python tests/sparse/sweep_models.py [--out sweep.csv] [--library timm|torchvision] [--match PATTERN] [--form classifier|pyramid|backbone]
                                        [--full] [--each] [--largest MILLIONS] [--limit SECONDS] [--again VERDICT,…]

A net counts as right when outputs at visible positions, all gradients of parameters and all running statistics agree in
float64, in train and in eval mode, and no gradient reaches a hidden pixel; weights are random, noise (dropout, drop path) is off. Blocks
that repeat are left out (`shallow.py`) unless --full is given. A net that differs from one with a row in width and depth only takes its
verdict, unless --each is given. Small nets and the first of each of timm's files come first; rows are appended at once, and a net with a
row is not run again, unless its verdict is named by --again ("as": where the verdict is another net's).
"""

from __future__ import annotations

import argparse
import collections
import copy
import csv
import fnmatch
import itertools
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from comparison import compare, randomise, some_mask
from shallow import kind, make_shallow
from torch import nn
from torch.overrides import TorchFunctionMode

import mwm

TABLE = Path(__file__).with_name("sweep.csv")
TOLERANCE = 1e-6
TOLERANCE_IN_FLOAT32 = 1e-4  # where timm's layer computes in float32 whatever the input
IN_FLOAT32 = ("EvoNorm", "FilterResponseNorm")
FIELDS = ("name", "form", "params_m", "depth", "verdict", "reason", "worst", "layers")
PRIME = 1_000_003  # random numbers from which weights are cut
HEAVY = 300e6  # parameters of a shallow net from which gradients are left out, which would take three times its memory
LARGE = 60e6  # parameters; larger nets come last
# Files of timm whose nets are no CNNs: attention, token mixing or state spaces all the way.
NO_CNN = set("""beit cait coat convit crossvit csatv2 davit deepseek_vit deit eva gcvit gemma4_vit hiera hieradet_sam2 mlp_mixer mvitv2 naflexvit nest pit pvt_v2
qwen3_vit sequencer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins vision_transformer vision_transformer_hybrid
vision_transformer_relpos vision_transformer_sam volo xcit""".split())
FORMS = ("classifier", "pyramid", "backbone")


def nets(library: str | None) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """(name, form, how to build it with random weights): no file is fetched."""
    found: list[tuple[str, str, Callable[[], nn.Module]]] = []
    if library != "timm":
        import torchvision

        for name in torchvision.models.list_models():
            found += [(f"torchvision/{name}", *way) for way in _torchvision(name)]
    if library != "torchvision":
        import timm

        files = collections.defaultdict(list)
        for name in timm.list_models():
            files[timm.models.model_entrypoint(name).__module__.rpartition(".")[2]].append(name)
        columns = [names for file, names in files.items() if file not in NO_CNN]
        for name in (name for row in itertools.zip_longest(*columns) for name in row if name):
            found.append((name, "classifier", lambda name=name: timm.create_model(name)))
            found.append((name, "pyramid", lambda name=name: timm.create_model(name, features_only=True)))
    return found


def _torchvision(name: str) -> list[tuple[str, Callable[[], nn.Module]]]:
    from torchvision import models

    def whole(name: str = name) -> nn.Module:
        builder = models.get_model_builder(name)
        place = builder.__module__
        options = {} if ".quantization" in place or "optical" in place or "video" in place else {"weights_backbone": None}
        return builder(weights=None, **(options if "detection" in place or "segmentation" in place else {}))

    place = models.get_model_builder(name).__module__
    if ".detection" in place or ".optical_flow" in place:
        return [("backbone", lambda: whole().backbone if ".detection" in place else whole().feature_encoder)]
    ways = [("classifier", whole)]
    if name in models.list_models(module=models):
        ways.append(("pyramid", lambda: mwm.sparse.create_encoder(f"torchvision/{name}")))
    return ways


def judge(net: nn.Module, full: bool, patch: int = 32) -> dict:
    """The row of a net, without its name."""
    dropped = 0 if full else make_shallow(net, 1)
    row = {"depth": f"{dropped} blocks fewer" if dropped else "full", "worst": ""}
    try:
        mwm.sparsify(copy.deepcopy(net, {id(p): p for p in net.parameters()}))
    except mwm.sparse.PackedError as error:
        return {**row, "verdict": "refused", "reason": _line(error)}
    net = _filled(net)
    heavy = sum(p.numel() for p in net.parameters()) > HEAVY
    row["depth"] += ", outputs only" if heavy else ""
    worst, where = 0.0, ""
    try:
        while True:
            try:
                for train in (True, False):
                    result = compare(net, some_mask(2, 3, 2), channels=3, patch=patch, train=train, backward=train and not heavy)
                    if not result.worst <= worst:
                        worst, where = result.worst, ("train: " if train else "eval: ") + "; ".join(result.where[:3])
                break
            except mwm.sparse.StrideError as error:
                legal = int(re.search(r"multiple of (\d+) pixels", str(error)).group(1))
                patch = legal * max(1, 32 // legal)  # one position per patch is too few for 32 batch norms in a row: noise of 1e-15 becomes 1e-3
                if patch > 128:
                    raise
    except Exception as error:
        text = _line(error)
        refused = isinstance(error, mwm.sparse.PackedError | mwm.sparse.StrideError) or (isinstance(error, ValueError) and text.startswith(("mwm", "tile_", "sparsify")))
        return {**row, "verdict": "refused" if refused else "error", "reason": text if refused else f"{type(error).__name__}: {text}"}
    narrow = any(type(module).__name__.startswith(IN_FLOAT32) for module in net.modules())
    right = worst <= (TOLERANCE_IN_FLOAT32 if narrow else TOLERANCE)
    return {**row, "verdict": "right" if right else "wrong", "reason": "" if right else where, "worst": f"{worst:.1e}"}


def _filled(net: nn.Module) -> nn.Module:
    """With random weights, in float64."""
    noise = torch.rand(PRIME, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            if p.dim() > 1:
                # Drawing every weight anew would take as long as the comparison.
                values = noise.roll(-7919 * i).repeat(-(-p.numel() // PRIME))[: p.numel()]
                p.data = values.reshape(p.shape) * (3 / max(1, p[0].numel())) ** 0.5
    return randomise(net).double()


def _silent(net: nn.Module) -> nn.Module:
    """Without noise."""
    for module in net.modules():
        for attribute in ("drop_prob", "p", "drop_rate"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return net


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]


class Unfilled(TorchFunctionMode):
    """Leaves the filters of a network as they lie in memory: they are filled once its blocks are fewer."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        target = args[0] if args else (kwargs or {}).get("tensor")
        skipped = getattr(func, "__name__", "") in _NOISE and isinstance(target, nn.Parameter) and target.dim() > 1
        return target if skipped else func(*args, **kwargs or {})


_NOISE = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_")


def main() -> int:
    """Run the sweep; the exit status is the number of nets that are wrong or end in an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(TABLE))
    parser.add_argument("--library", choices=("timm", "torchvision"))
    parser.add_argument("--match", default="*")
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--largest", type=float, default=2000.0)
    parser.add_argument("--limit", type=int, default=600)
    parser.add_argument("--again", default="")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    out = Path(options.out)
    rows = {(row["name"], row["form"]): row for row in csv.DictReader(out.open())} if out.exists() else {}
    again = options.again.split(",")
    chosen = [key for key in rows if fnmatch.fnmatch(key[0], options.match) and options.form in (None, key[1])]
    rows = {key: row for key, row in rows.items() if key not in chosen or not _repeated(row, again)}
    known: dict[str, dict] = {}
    for row in rows.values():
        if row["layers"] and row["worst"]:
            known.setdefault(row["layers"], row)

    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS)
        table.writeheader()
        table.writerows(rows.values())
        file.flush()

        def note(name: str, form: str, row: dict, seconds: float) -> None:
            rows[name, form] = row = {**row, "name": name, "form": form}
            if row["layers"] and (row["worst"] or row["verdict"] == "refused"):
                known.setdefault(row["layers"], row)
            table.writerow(row)
            file.flush()
            print(f"{row['verdict']:8} {name:44} {form:10} {seconds:5.1f} s  {row['worst']} {row['reason']}", flush=True)

        first = True
        todo = [net for net in nets(options.library) if net[:2] not in rows and fnmatch.fnmatch(net[0], options.match) and options.form in (None, net[1])]
        large = []
        signal.signal(signal.SIGALRM, _too_slow)
        while todo or large:
            if not todo:
                todo, large, first = [net for size, net in sorted(large, key=lambda item: item[0]) if size <= options.largest * 1e6], [], False
                continue
            start = time.perf_counter()
            name, form, build = todo.pop(0)
            torch.manual_seed(0)
            try:
                with Unfilled():
                    net = build()
            except Exception as error:
                note(name, form, {"verdict": "unbuilt", "reason": _line(error), "worst": "", "layers": ""}, 0.0)
                continue
            size = sum(p.numel() for p in net.parameters())
            row = {"params_m": f"{size / 1e6:.2f}", "layers": kind(_silent(net))}
            if row["layers"] in known and not options.each:
                same = known[row["layers"]]
                row = {**row, "depth": f"as {same['name']}", "verdict": same["verdict"], "reason": same["reason"], "worst": ""}
            elif size > LARGE and first:
                large.append((size, (name, form, build)))
                continue
            else:
                signal.alarm(options.limit)
                row = {**row, **judge(net, options.full)}
                signal.alarm(0)
            note(name, form, row, time.perf_counter() - start)
    print(dict(collections.Counter(row["verdict"] for row in rows.values())))
    return min(125, sum(row["verdict"] in ("wrong", "error") for row in rows.values()))


def _repeated(row: dict, again: list[str]) -> bool:
    return row["verdict"] in again or ("as" in again and row["depth"].startswith("as "))


def _too_slow(*_: object) -> None:
    raise TimeoutError("it ran longer than --limit")


if __name__ == "__main__":
    sys.exit(main())
