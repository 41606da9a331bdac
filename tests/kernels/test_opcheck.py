"""The registered ops with Triton behind them: schema, fakes (shapes, strides, dtypes) and derivatives are those that torch.compile believes."""

from __future__ import annotations

import harness
import pytest
import torch

from mwm import ops

MASK = harness.masks()["mixed"]


def _cases(device: str) -> dict[str, tuple]:
    plan = ops.build_plan(MASK, 4).to(device)
    batch, rows, columns = MASK.shape
    x = torch.randn(batch, 3, 4 * rows, 4 * columns, device=device)
    tiles = torch.randn(plan.num_tiles, 3, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    strata, ids = torch.randint(0, 2, (batch, rows * columns), device=device), torch.arange(batch, device=device)
    indices = plan.tensors()
    return {
        "pack_tiles": (x.requires_grad_(), *indices[:3], "triton"),
        "unpack_tiles": (tiles.clone().requires_grad_(), *indices[:3], 0.5, "triton"),
        "image_sum": (tiles.clone().requires_grad_(), *indices, "triton"),
        "tile_pool": (tiles.clone().requires_grad_(), *indices[:3], [1, 3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 0, 1, 0], None, "triton"),
        "patch_loss": (x.detach().clone().requires_grad_(), torch.randn_like(x), plan.active, 4, 0.1, 0.2, 1e-6, "triton"),
        "build_plan": (plan.active, -1, "triton"),
        "region_coverage": (torch.rand(2, 8, 12, device=device), 2, 3, 1, 4, "triton"),
        "sample_active": (strata, ops.to_q32([0.3, 0.6]).to(device), False, rows, columns, 1, ids, 2, 0, None, "triton"),
        "random_words": (1, ids, 2, 3, 4, 5, "triton"),
    }


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck itself asks for it
@pytest.mark.parametrize("name", ["pack_tiles", "unpack_tiles", "image_sum", "tile_pool", "patch_loss", "build_plan", "region_coverage", "sample_active", "random_words"])
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mwm, name).default, _cases(device)[name])
