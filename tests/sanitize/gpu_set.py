"""The reduced set that compute-sanitizer watches: every CUDA and Triton kernel once or twice at small sizes, checked against the reference.

    python tests/sanitize/gpu_set.py [cuda triton]

Inputs are made on the host and copied, so that next to no kernel but ours runs: initcheck then speaks of ours alone.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from mwm import ops

DEVICE = torch.device("cuda")


def _move(value: object) -> object:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def _close(name: str, mine: Tensor, other: Tensor) -> None:
    mine, other = mine.cpu().double(), other.double()
    if mine.shape != other.shape or not torch.allclose(mine, other, rtol=2e-2, atol=2e-2, equal_nan=True):
        sys.exit(f"gpu_set: {name} is wrong by {float((mine - other).abs().max()) if mine.shape == other.shape else 'its shape'}")


def masks(backend: str) -> None:
    """Coverage, words, masks, plans."""
    region = torch.rand(3, 64, 96)
    for mine, other in zip(ops.region_coverage(region.to(DEVICE), (4, 6), backend=backend), ops.region_coverage(region, (4, 6), backend="reference"), strict=True):
        _close("region_coverage", mine, other)
    ids = torch.arange(3)
    _close("random_words", ops.random_words(1, ids.to(DEVICE), 0, 0, 20, 9, backend=backend), ops.random_words(1, ids, 0, 0, 20, 9, backend="reference"))
    for rows, columns in ((7, 7), (14, 14), (50, 50)):
        strata, ratio = torch.randint(0, 2, (3, rows * columns)), ops.to_q32([0.4, 0.8])
        for weights in (None, torch.rand(3, rows * columns).mul(100).long()):
            settings = {"grid": (rows, columns), "seed": 0, "epoch": 0}
            found = ops.sample_active(strata.to(DEVICE), ratio.to(DEVICE), ids=ids.to(DEVICE), weights=_move(weights), backend=backend, **settings)
            _close("sample_active", found, ops.sample_active(strata, ratio, ids=ids, weights=weights, backend="reference", **settings))


def tiles(backend: str, dtype: torch.dtype) -> None:
    """Packing, pooling, sums, convolutions with their derivatives, for tiles of every edge."""
    active = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    for edge in (1, 2, 3, 4, 8):
        plan = ops.build_plan(active, edge, backend="reference")
        there = plan.to(DEVICE)
        x = torch.randn(3, 6, 4 * edge, 5 * edge).to(dtype)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            _close("pack_tiles", ops.pack_tiles(given.to(DEVICE), there, backend=backend), ops.pack_tiles(given, plan, backend="reference"))
        packed = ops.pack_tiles(x, plan, backend="reference").contiguous(memory_format=torch.channels_last)
        _close("unpack_tiles", ops.unpack_tiles(packed.to(DEVICE), there, backend=backend), ops.unpack_tiles(packed, plan, backend="reference"))
        runs = {
            "image_sum": (lambda t, w, p, b: ops.image_sum(t, p, backend=b), None),
            "max pool": (lambda t, w, p, b: ops.tile_pool(t, p, kernel_size=3, stride=1, padding=1, backend=b), None),
            "average pool": (lambda t, w, p, b: ops.tile_pool(t, p, mode="avg", kernel_size=3, stride=1, padding=1, backend=b), None),
            **{f"depthwise {k}": (lambda t, w, p, b, k=k: ops.tile_conv(t, w, None, p, padding=k // 2, groups=6, backend=b), torch.randn(6, 1, k, k).to(dtype)) for k in (3, 7)},
            "conv 3x3": (lambda t, w, p, b: ops.tile_conv(t, w, None, p, padding=1, backend=b), torch.randn(8, 6, 3, 3).to(dtype) / 8),
        }
        for name, (run, weight) in runs.items():
            op = {"image_sum": "image_sum", "max pool": "tile_pool", "average pool": "tile_pool", "conv 3x3": "tile_conv"}.get(name, "depthwise_conv")
            if ops.reasons(op, backend, packed.to(DEVICE)):
                continue
            results = []
            for plan_of, how, where in ((there, backend, DEVICE), (plan, "reference", torch.device("cpu"))):
                leaves = [t.clone().to(where).requires_grad_() for t in (packed, weight) if t is not None]
                out = run(leaves[0], leaves[-1], plan_of, how)
                grad = torch.ones(out.shape).to(out.dtype).contiguous(memory_format=torch.channels_last if out.dim() == 4 else torch.contiguous_format)
                results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(where))])
            for mine, other in zip(*results, strict=True):
                _close(f"{name} t{edge} {dtype}", mine / 16, other.cpu() / 16)


def norms(backend: str, dtype: torch.dtype) -> None:
    """Batch norm with residual and ReLU, for rows that are read 16 bytes at a time and others."""
    for shape in ((5, 6, 3, 3), (40, 64, 2, 2), (3, 8, 1, 1)):
        x, residual = (torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(2))
        rows = [torch.rand(shape[1]) + 0.5 for _ in range(2)]
        results, grad = [], None
        for how, where in (("reference", torch.device("cpu")), (backend, DEVICE)):
            leaves = [t.clone().to(where).requires_grad_() for t in (x, *rows, residual)]
            mean, var = ops.batch_moments(leaves[0], backend=how)
            out = ops.batch_norm(leaves[0], mean, var, *leaves[1:3], residual=leaves[3], activation="relu", backend=how)
            if grad is None:  # next to the kink of the ReLU rounding decides on the derivative
                grad = (out.detach() > 0.1).to(out.dtype)
            results.append([out.detach(), mean, var, *torch.autograd.grad(out, leaves, grad.to(where))])
        for other, mine in zip(*results, strict=True):
            _close(f"batch norm {shape} {dtype}", mine / 16, other.cpu() / 16)


def main(backends: list[str]) -> None:
    ran = []
    for backend in backends:
        if found := ops.reasons("sample_active", backend, torch.empty(1, dtype=torch.int64, device=DEVICE)):
            print(f"gpu_set: {backend} left out: {'; '.join(found)}")
            continue
        masks(backend)
        if backend == "cuda":
            active = torch.rand(5, 3, 4) < 0.5
            for mine, other in zip(ops.build_plan(active.to(DEVICE), 4, backend="cuda").tensors(), ops.build_plan(active, 4, backend="reference").tensors(), strict=True):
                _close("build_plan", mine, other)
        for dtype in (torch.float32, torch.bfloat16):
            tiles(backend, dtype)
            norms(backend, dtype)
        ran.append(backend)
    torch.cuda.synchronize()
    if not ran:
        sys.exit("gpu_set: no backend ran.")
    print(f"gpu_set: {' and '.join(ran)} agree with the reference")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:] or ["cuda", "triton"])
