"""From regions on pixels to the patch grid, in per cent of this machine's memory bandwidth.

The bandwidth is the faster of a copy (read + written bytes) and two plain reads of the same memory, taken in turn with ours in
the same process, in the way of STREAM (McCalpin 1995).
"""

from __future__ import annotations

from functools import partial

import torch
from mwm.bench.harness import Case, Check, Match, Reading, seconds
from mwm.bench.settings import Settings

from mwm import ops


def prepare(batch: int, size: int, edge: int, dtype: torch.dtype = torch.float32) -> Match:
    """Coverage of [batch, size, size] on edge x edge patches; results are compared with the plain-torch reference to the bit."""
    region = torch.rand(batch, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    few = region[:8]
    got, want = ops.region_coverage(few, (edge, edge)), ops.region_coverage(few, (edge, edge), backend="reference")
    wrong = float(sum((a != b).sum() for a, b in zip(got, want, strict=True)))
    number = region.numel() * region.element_size()
    flat = region.view(-1)
    half = flat[: flat.numel() // 2]
    target = torch.zeros_like(half)

    def rate(*steps) -> Reading:
        return lambda: max(1e-9 * number / seconds(step) for step in steps)

    return Match(rate(lambda: ops.region_coverage(region, (edge, edge))),
                 {"memory bandwidth": rate(lambda: target.copy_(half), flat.sum, flat.amax)}, {"memory bandwidth": Check(wrong, 0.0)},
                 unit="GB/s", score_is="ours in % of rival", notes={"": "bandwidth: fastest of copy, sum and maximum of the same memory"})


def cases(settings: Settings) -> list[Case]:
    """The regions of 1024 images at 224 px, the size the sampler's row begins with."""
    if settings.smoke:
        return [Case("coverage", "smoke: [16, 32, 32] to 2x2", partial(prepare, 16, 32, 2), 1)]
    return [Case("coverage", f"[1024, 224, 224] to {edge}x{edge}", partial(prepare, 1024, 224, edge), 15) for edge in (7, 14)]
