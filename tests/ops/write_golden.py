"""Write golden_masks.json: masks that no later version may change. Run by hand, and only with a new SAMPLER_VERSION."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from mwm import ops

HERE = Path(__file__).resolve().parent


def inputs() -> dict[str, dict]:
    """Arguments of `sample_active` by name; strata and weights are arithmetic, not random, so that they never drift."""

    def strata(batch: int, patches: int, kinds: int) -> Tensor:
        return (torch.arange(batch)[:, None] * 5 + torch.arange(patches) ** 2) % 7 % kinds

    one, two, three = strata(4, 49, 1), strata(6, 49, 2), strata(3, 70, 3)
    ramp = (torch.arange(49).expand(6, 49) % 11 / 10).float()
    return {
        "uniform 0.6": {"strata": one, "ratio": ops.to_q32([0.6]), "grid": (7, 7), "seed": 0, "ids": [0, 1, 2, 4294967295], "epoch": 0},
        "region 0.8/0.4": {"strata": two, "ratio": ops.to_q32([0.4, 0.8]), "grid": (7, 7), "seed": 1, "ids": [9, 8, 7, 6, 5, 4], "epoch": 3},
        "region, view 1": {"strata": two, "ratio": ops.to_q32([0.4, 0.8]), "grid": (7, 7), "seed": 1, "ids": [9, 8, 7, 6, 5, 4], "epoch": 3, "view": 1},
        "weighted": {"strata": two, "ratio": ops.to_q32([0.3, 0.7]), "grid": (7, 7), "seed": 2**64 - 1, "ids": range(6), "epoch": 2**32 - 1, "weights": ramp},
        "exact counts": {"strata": three, "hidden": torch.tensor([3, 0, 20]), "grid": (7, 10), "seed": 5, "ids": [10, 20, 30], "epoch": 1},
        "large grid": {"strata": strata(2, 400, 2), "ratio": ops.to_q32([0.25, 0.9]), "grid": (20, 20), "seed": 6, "ids": [1, 2], "epoch": 7},
    }


def draw(name: str, backend: str | None = None) -> Tensor:
    """The masks of one case. bool [B, Gh, Gw]"""
    arguments = dict(inputs()[name])
    return ops.sample_active(arguments.pop("strata"), arguments.pop("ratio", None), backend=backend, **arguments)


def as_text(active: Tensor) -> dict:
    """First image as rows of # (visible) and . (hidden), all images as a hash of their bits."""
    bits = "".join("#" if v else "." for v in active.flatten().tolist())
    first = ["".join("#" if v else "." for v in row) for row in active[0].tolist()]
    return {"shape": list(active.shape), "first": first, "sha256": hashlib.sha256(bits.encode()).hexdigest()}


if __name__ == "__main__":
    cases = {name: as_text(draw(name, "reference")) for name in inputs()}
    (HERE / "golden_masks.json").write_text(json.dumps({"sampler_version": ops.SAMPLER_VERSION, "cases": cases}, indent=1) + "\n")
