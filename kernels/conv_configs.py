"""Which block sizes a convolution runs with: shipped tables by device, read once, looked up by shapes alone.

A table `configs/<device>.json` holds, for each op, direction and kind of numbers, a list of rules; the first one whose bounds the
layer keeps is taken. `mwm tune` writes such tables from measurements; nothing is ever measured while a network runs.
"""

import functools
import json
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent / "configs"
DEVICES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))  # "generic" and names of GPUs
ALIGNED = 8  # elements that one load may take
LEAST_CHUNK = 16  # channels below which (tap, channel) are run through without gaps; the least inner size of a dot
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
NUMBERS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))  # dtype, whether TF32 may stand in
BOUNDS = ("max_rows", "max_columns", "max_depth")
SIZES = ("block_m", "block_n", "block_k", "num_warps", "num_stages", "group_m")


def kind_of(dtype, tf32):
    """"16" for bfloat16 and float16, "tf32", or "32"."""
    return "tf32" if tf32 and dtype == torch.float32 else "32" if dtype == torch.float32 else "16"


@functools.cache
def device_name(device):
    """The table that a device uses: the one whose name stands in the GPU's, e.g. "h200", or "generic" (also in the interpreter)."""
    words = torch.cuda.get_device_name(device).lower() if device.type == "cuda" else ""
    return next((name for name in DEVICES if name in words), "generic")


def alignment(channels, stride):
    """8 where rows of channels begin at multiples of 8 elements, else 1; kernels take such sizes divided by it, as constants do not divide them."""
    return ALIGNED if channels % ALIGNED == 0 and stride % ALIGNED == 0 else 1


@functools.cache
def table(device):
    """The rules of a device, {op: {direction: {kind: [rule, …]}}}."""
    return json.loads((FOLDER / f"{device}.json").read_text(encoding="utf-8"))


@functools.cache
def pick(op, direction, kind, rows, columns, depth, device, odd=False):
    """The rule of a layer.

    Args:
        op: "tile_conv" or "depthwise".
        direction: "forward", "grad_input" or "grad_weight".
        kind: As `kind_of` says.
        rows: Positions of the result (forward, input gradient: of one parity class) or those that are summed (weight gradient).
        columns: Channels of the result, of one group; weight gradient: filters of one group.
        depth: Channels that are read, of one group.
        device: As `device_name` says.
        odd: Rows of channels do not begin at multiples of 8 elements, so that nothing is read 16 bytes at a time.

    Returns:
        {"block_m": …, "block_n": …, "block_k": …, "num_warps": …, "num_stages": …, "group_m": …}, and "dense_from": the visible share
        from which the dense convolution is faster, where the table knows one.
    """
    size = dict(max_rows=rows, max_columns=columns, max_depth=depth)
    for source in (device, "generic"):
        for rule in table(source).get(op, {}).get(direction, {}).get(kind, ()):
            if all(size[bound] <= rule[bound] for bound in BOUNDS if bound in rule) and odd >= rule.get("odd", False):
                return rule
    raise LookupError(f"{op}: no rule for {direction}, {kind} in the config tables of {device}")


def examples(op, direction, every=True):
    """(dtype, whether TF32 may stand in, rows, columns, depth, device) of a layer for every distinct rule of the shipped tables.

    Without `every`: all rules in bfloat16 (input gradient, which shares its kernel and tables with the forward pass: those for odd and for large
    layers), and of the other kinds of numbers the rule for large layers.

    Raises:
        LookupError: No layer takes a rule, since earlier ones take all of its layers.
    """
    seen = set()
    for device in DEVICES:
        for dtype, tf32 in NUMBERS:
            kind = kind_of(dtype, tf32)
            found = table(device).get(op, {}).get(direction, {}).get(kind, ())
            for rule in found:
                few = direction == "grad_input" and not rule.get("odd")
                if not every and rule is not found[-1] and (few or dtype != torch.bfloat16):
                    continue
                layer = rule.get("max_rows", 2**18), rule.get("max_columns", 512), rule.get("max_depth", 512)
                odd = rule.get("odd", False)
                layer = tuple(size - odd for size in layer)
                if pick(op, direction, kind, *layer, device, odd) != rule:
                    raise LookupError(f"{op}: no layer takes the rule {rule} of {direction}, {kind} in the config table of {device}")
                key = dtype, tf32, *sorted(rule.items())
                if key not in seen:
                    seen.add(key)
                    yield dtype, tf32, *layer, device
