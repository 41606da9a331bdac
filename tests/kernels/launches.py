"""Every launch with the arguments that the ops really pass, up to the point where a GPU would be needed: bound, specialised and compiled to sm_90 code.

The interpreter forgives what the compiler does not (a keyword that is no option, an argument that became a constant), and compile_cases() lists types by
hand. Here the ops of this package run on CPU tensors with Triton's launcher replaced. Prints one line per kernel; an error ends it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mwm import ops
from mwm.ops import gpu

TARGET = GPUTarget("cuda", 90, 32)
_SEEN: dict[str, int] = {}


def _compile_only(self: JITFunction, *args: Any, grid: tuple, warmup: bool, **kwargs: Any) -> None:
    kwargs["debug"] = kwargs.get("debug", self.debug)
    backend = make_backend(TARGET)
    bound, specialization, options = create_function_from_signature(self.signature, self.params, backend)(*args, **kwargs)
    options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
    triton.compile(triton.compiler.ASTSource(self, signature, constants, attributes), target=TARGET, options=options.__dict__)
    assert all(0 < size < 2**31 for size in grid), f"{self.__name__}: grid {grid}"
    _SEEN[self.__name__] = _SEEN.get(self.__name__, 0) + 1


def main() -> None:
    """Call every op once in each of its ways."""
    JITFunction.run = _compile_only
    gpu.interpreted, gpu._load_triton = (lambda: True), (lambda: (triton, ""))
    on = {"backend": "triton"}
    active = torch.ones(2, 3, 4, dtype=torch.bool)
    active[1, 1] = False
    plan = ops.build_plan(active, 4)
    ops.build_plan(active, 4, **on)
    ops.build_plan(torch.ones(1, 1, 1, dtype=torch.bool), 4, visible=1, **on)
    for channels, edge in ((3, 4), (1, 1)):
        x = torch.randn(2, channels, 3 * edge, 4 * edge, requires_grad=True)
        ops.pack_tiles(x, plan, **on).sum().backward()
        tiles = torch.randn(plan.num_tiles, channels, edge, edge, requires_grad=True)
        ops.unpack_tiles(tiles, plan, 0.5, **on).sum().backward()
        ops.image_sum(tiles, plan, **on).sum().backward()
        for mode in ("max", "avg"):
            ops.tile_pool(tiles, plan, mode=mode, kernel_size=3, stride=2 if edge > 1 else 1, padding=1, **on).sum().backward()
        predicted = torch.randn_like(x, requires_grad=True)
        ops.patch_loss(predicted, x.detach(), active, edge, **on)[0].backward()
        maps = [torch.randn(6, channels, 2, 2).to(dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16) for _ in range(2)]
        for y, residual in ((maps[0], maps[1]), (maps[2], maps[3]), (maps[0], None)):
            mean, var = ops.batch_moments(y, torch.zeros(channels), torch.ones(channels), **on)
            for activation in (None, "relu", "relu6"):
                weight = torch.ones(channels, requires_grad=True) if residual is None else None
                ops.batch_norm(y, mean, var, weight, weight, residual=residual, activation=activation, **on).sum().backward()
    for region, grid in ((torch.rand(2, 12, 16), (3, 4)), (torch.rand(2, 40, 40).bfloat16(), (20, 20)), (torch.ones(1, 1, 1, dtype=torch.bool), (1, 1))):
        ids = list(range(len(region)))
        ops.region_coverage(region, grid, **on)
        for hidden in (None, 1):
            ops.region_active(region, grid, [1 << 31, 1 << 32, 0], hidden=hidden, seed=1, ids=ids, epoch=0, **on)
    for strata in (torch.zeros(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.bool)):
        settings = {"grid": (3, 4), "seed": 2**64 - 1, "ids": [1, 2], "epoch": 1, "view": 1, **on}
        ops.sample_active(strata, ops.to_q32([0.3, 0.4]), **settings)
        ops.sample_active(strata, hidden=torch.tensor([3, 0]), weights=torch.rand(2, 12), **settings)
    ops.random_words(1, [1, 2], 1, 1, 1, 1, **on)
    for name, count in sorted(_SEEN.items()):
        print(f"ok {name}: {count} launches")


if __name__ == "__main__":
    main()
