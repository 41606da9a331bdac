"""Config tables of the convolutions: times candidate block sizes on the GPU of this machine and writes a table for kernels/configs.

The layers are those 3x3 convolutions and the stem of ResNet-50 at patch 32 (ConvNeXt's and all 1x1 convolutions are cuBLAS's or depthwise),
bfloat16, 60 % hidden. A candidate that spills registers or does not fit is left out; one whose result differs from the table's choice stops the
run. Each layer's best becomes a rule for layers that are no larger; the shipped rules follow, for all others. Where the dense convolution, with
unpacking and packing, would win below full visibility, the rule says from which visible share on. Nothing is measured while a network runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mwm.bench.encoders import random_active
from mwm.bench.gpu_timing import graph_timed
from mwm.kernels import conv_configs, tile_conv, tile_conv_weight
from torch import Tensor

from mwm import ops
from mwm.ops.tile_conv_gpu import repeatable

DIRECTIONS = ("forward", "grad_input", "grad_weight")
HIDDEN, GRID, BATCH = 0.6, (7, 7), 128


@dataclass(frozen=True)
class TuneLayer:
    """A convolution: edge of its tiles at the input, channels, filters, kernel, stride."""

    edge: int
    channels: int
    filters: int
    kernel: int = 3
    stride: int = 1

    @property
    def geometry(self) -> list[int]:
        """As the kernels take it."""
        return [self.stride, 1, 1, *[(self.kernel - 1) // 2] * 4, 1]

    def size(self, direction: str, tiles: int) -> tuple[int, int, int]:
        """(rows, columns, depth) by which the table is looked up."""
        small = self.edge // self.stride
        if direction == "grad_input":
            return tiles * small * small, self.channels, self.filters
        return tiles * small * small, self.filters, self.channels


LAYERS = (TuneLayer(8, 64, 64), TuneLayer(4, 128, 128), TuneLayer(2, 256, 256), TuneLayer(1, 512, 512), TuneLayer(8, 128, 128, stride=2),
          TuneLayer(4, 256, 256, stride=2), TuneLayer(2, 512, 512, stride=2), TuneLayer(32, 3, 64, 7, 2))
QUICK = LAYERS[:3]


def candidates(direction: str, layer: TuneLayer, *, quick: bool = False) -> list[dict[str, int]]:
    """Block sizes worth a try for a layer, the largest first."""
    depth, columns = (layer.filters, layer.channels) if direction == "grad_input" else (layer.channels, layer.filters)
    found = []
    if direction == "grad_weight":
        for n, k, m, warps in ((128, 128, 64, 8), (128, 128, 32, 8), (128, 64, 64, 4), (64, 128, 64, 4), (64, 64, 64, 4), (64, 64, 128, 4), (64, 64, 32, 4)):
            if n <= max(64, columns) and k <= max(64, depth):
                found += [dict(block_n=n, block_k=k, block_m=m, num_warps=warps, num_stages=stages, programs=programs)
                          for stages in ((7,) if quick else (4, 7)) for programs in ((264,) if quick else (132, 264, 528))]
        return found
    for m, n, k, warps in ((128, 256, 64, 8), (256, 128, 64, 8), (128, 128, 64, 8), (128, 128, 32, 4), (128, 64, 64, 4), (256, 64, 64, 8), (64, 128, 64, 4),
                           (64, 64, 64, 4), (128, 64, 32, 4), (64, 64, 32, 4), (128, 32, 32, 4), (128, 16, 32, 4)):
        if n <= max(16, columns) and k <= max(32, depth):
            found += [dict(block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages, group_m=8) for stages in ((5,) if quick else (4, 5, 7))]
    return found


def current(direction: str, layer: TuneLayer, tiles: int, device: str) -> dict[str, float]:
    """The rule that the shipped table has for a layer."""
    return conv_configs.pick("tile_conv", direction, "16", *layer.size(direction, tiles), device)


class Trial:
    """The tensors of one layer on one device, and its three passes."""

    def __init__(self, layer: TuneLayer, device: str, batch: int = BATCH, grid: tuple[int, int] = GRID) -> None:
        active, visible = random_active(batch, grid, HIDDEN)
        self.layer, self.device = layer, device
        self.plan = ops.build_plan(active.to(device), layer.edge, visible=visible)
        small = layer.edge // layer.stride
        self.x = self._new(self.plan.num_tiles, layer.channels, layer.edge)
        self.grad = self._new(self.plan.num_tiles, layer.filters, small)
        self.weight = self._new(layer.filters, layer.channels, layer.kernel)

    def _new(self, number: int, channels: int, edge: int) -> Tensor:
        values = torch.randn(number, channels, edge, edge).to(self.device, torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last)

    def run(self, direction: str, config: dict[str, int]) -> tuple[Tensor, object]:
        """(result, Triton's handle of the kernel)."""
        place = self.plan.coords, self.plan.slots, self.layer.geometry
        if direction == "forward":
            out = torch.empty_like(self.grad)
            return out, tile_conv.forward(self.x, self.weight, None, *place, out, config=config)
        if direction == "grad_input":
            out = torch.empty_like(self.x)
            return out, tile_conv.grad_input(self.grad, self.weight, None, *place, out, config=config)
        out = torch.empty_like(self.weight)
        return out, tile_conv_weight.grad_weight(self.grad, self.x, *place, out, config=config)

    def dense(self, direction: str) -> Callable[[], object]:
        """The dense convolution, with unpacking and packing, as `tile_conv` would run it."""
        layer, plan, pad = self.layer, self.plan, self.layer.geometry[3]
        like = ops.unpack_tiles(self.x, plan)

        def backward(which: int) -> Tensor:
            wanted, grad, x = [which == 0, which == 1, False], ops.unpack_tiles(self.grad, plan), like if which == 0 else ops.unpack_tiles(self.x, plan)
            with repeatable():
                return torch.ops.aten.convolution_backward(grad, x, self.weight, None, [layer.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, wanted)[which]

        def forward() -> Tensor:
            with repeatable():
                return torch.nn.functional.conv2d(ops.unpack_tiles(self.x, plan), self.weight, None, layer.stride, pad)

        if direction == "forward":
            return lambda: ops.pack_tiles(forward(), plan)
        return (lambda: ops.pack_tiles(backward(0), plan)) if direction == "grad_input" else lambda: backward(1)


def best(trial: Trial, direction: str, *, quick: bool, table: str, say: Callable[[str], None] = print) -> dict[str, float]:
    """The fastest candidate of a layer, with its milliseconds, and "dense_from" where the dense convolution wins.

    Raises:
        RuntimeError: No candidate runs, or one computes something else than the shipped choice.
    """
    want, _ = trial.run(direction, current(direction, trial.layer, trial.plan.num_tiles, table))
    times: list[tuple[float, dict[str, int]]] = []
    for config in candidates(direction, trial.layer, quick=quick):
        try:
            got, compiled = trial.run(direction, config)
        except Exception as error:  # too much shared memory, or a compiler's limit: no candidate
            say(f"    {_words(config)}: {type(error).__name__}")
            continue
        if getattr(compiled, "n_spills", 0):
            continue
        difference = float((got.float() - want.float()).norm() / want.float().norm())
        if not difference < 1e-2:
            raise RuntimeError(f"tune: {direction} of {trial.layer} with {_words(config)} differs from the shipped choice by {difference:.1e}.")
        read = graph_timed(lambda config=config: trial.run(direction, config), trial.device)
        times.append((min(read() for _ in range(3)), config))
    if not times:
        raise RuntimeError(f"tune: no candidate runs {direction} of {trial.layer} here.")
    time, config = min(times, key=lambda pair: pair[0])
    read = graph_timed(trial.dense(direction), trial.device)
    share = trial.plan.num_tiles / trial.plan.active.numel() * min(read() for _ in range(3)) / time
    say(f"  {direction}, {trial.layer.channels}-{trial.layer.filters} t{trial.layer.edge}: {time:.4f} ms with {_words(config)}; "
        f"dense is faster from {share:.2f} visible")
    return config | ({"dense_from": round(share, 3)} if share < 1 else {})


def rules(found: Sequence[tuple[tuple[int, int, int], dict[str, float]]], shipped: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Rules of a table from ((rows, columns, depth), config) of measured layers: small ones first, then what was shipped.

    Of layers of one size the first one counts: with stride 1 there are more of them than with stride 2.
    """
    measured, unique = [], {}
    for size, config in found:
        unique.setdefault(size, config)
    for (rows, columns, depth), config in sorted(unique.items(), key=lambda pair: (pair[0][1], pair[0][2], pair[0][0])):
        measured.append(dict(max_rows=1 << (rows - 1).bit_length(), max_columns=columns, max_depth=depth) | config)
    odd = [rule for rule in shipped if rule.get("odd")]
    few = [rule for rule in shipped if not rule.get("odd") and rule.get("max_depth", conv_configs.LEAST_CHUNK) < conv_configs.LEAST_CHUNK]
    rest = [rule for rule in shipped if rule not in odd and rule not in few]
    # A layer of few channels runs another loop: no other layer may take its rule, nor it theirs.
    return [*odd, *(rule for rule in measured if rule["max_depth"] < conv_configs.LEAST_CHUNK), *few,
            *(rule for rule in measured if rule["max_depth"] >= conv_configs.LEAST_CHUNK), *rest]


def dump(table: dict) -> str:
    """The JSON of a table, one rule per line."""
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for op, directions in table.items():
        if isinstance(directions, dict):
            inner = []
            for direction, kinds in directions.items():
                lists = [f"      {json.dumps(kind)}: [\n" + ",\n".join(f"        {json.dumps(rule)}" for rule in found) + "\n      ]" for kind, found in kinds.items()]
                inner.append(f"    {json.dumps(direction)}: {{\n" + ",\n".join(lists) + "\n    }")
            parts.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(inner) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tune(directions: Sequence[str], out: Path, *, quick: bool) -> None:
    """Measure on the current GPU and write the table; it is written anew after each layer, so that a run that is cut leaves one."""
    name, device = torch.cuda.get_device_name(), conv_configs.device_name(torch.device("cuda", torch.cuda.current_device()))
    shipped = conv_configs.table(device)
    table = json.loads(json.dumps(shipped)) | {"device": name, "about": f"Measured by mwm tune with torch {torch.__version__}."}
    torch.backends.cudnn.benchmark = True
    found: dict[str, list] = {direction: [] for direction in directions}
    for layer in QUICK if quick else LAYERS:
        trial = Trial(layer, "cuda")
        for direction in directions:
            if direction != "grad_input" or layer.channels > 3:  # nobody asks for the gradient of the images
                found[direction].append((layer.size(direction, trial.plan.num_tiles), best(trial, direction, quick=quick, table=device)))
                table["tile_conv"][direction]["16"] = rules(found[direction], shipped["tile_conv"][direction]["16"])
        out.write_text(dump(table), encoding="utf-8")


def listing(directions: Sequence[str], device: str) -> list[str]:
    """Lines of the table in use and of the candidates."""
    tiles = BATCH * (GRID[0] * GRID[1] - round(HIDDEN * GRID[0] * GRID[1]))
    lines = [f"table {device} ({conv_configs.FOLDER / (device + '.json')}): {conv_configs.table(device).get('about', '')}"]
    for direction in directions:
        for layer in LAYERS:
            number = len(candidates(direction, layer))
            lines.append(f"  {direction:11} {layer.kernel}x{layer.kernel}/{layer.stride} {layer.channels}-{layer.filters} t{layer.edge}: "
                         f"{_words(current(direction, layer, tiles, device))}; {number} candidates")
    return lines


def _words(config: dict[str, float]) -> str:
    return ", ".join(f"{key} {value}" for key, value in config.items() if key in (*conv_configs.SIZES, "programs"))
