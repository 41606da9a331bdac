"""From regions to masks at once: the same as the policy's own steps, on every backend."""

from __future__ import annotations

import pytest
import torch

from mwm import ops
from mwm.masking import create_policy


def _regions(batch: int = 9) -> torch.Tensor:
    region = torch.rand(batch, 28, 28)
    region[torch.arange(28) >= torch.randint(0, 28, (batch, 1, 1)).expand(batch, 28, 28)] = 0
    region[0] = 0
    return region


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_are_those_of_the_region_policy(backend: str) -> None:
    region, ids = _regions(), torch.arange(9)
    policy = create_policy("region", high=0.8, low=0.4).with_empty_share(0.55)
    active, inside = ops.region_active(region, (7, 7), ops.to_q32([0.4, 0.8, 0.55]).tolist(), seed=3, ids=ids, epoch=2, view=1, backend=backend)
    assert torch.equal(active, policy(region, grid=(7, 7), seed=3, ids=ids, epoch=2, view=1))
    assert torch.equal(inside, policy.inside(region, (7, 7)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masks_of_a_fixed_count_are_those_of_the_region_policy(backend: str) -> None:
    region, ids = _regions(), torch.arange(9)
    policy = create_policy("region", overall=0.6)
    active, _ = ops.region_active(region, (7, 7), ops.to_q32([0.0, 0.8, 0.0]).tolist(), hidden=29, stream=64, seed=3, ids=ids, epoch=2, backend=backend)
    assert torch.equal(active, policy(region, grid=(7, 7), seed=3, ids=ids, epoch=2))
    assert ((~active).flatten(1).sum(1) == 29).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"region": torch.zeros(1, 9, 8)}, "region_active: region must divide into the grid 2 x 2"),
        ({"ids": [1, 2]}, "B = 1"),
        ({"ratio": [0, 1]}, "three Q32"),
        ({"ratio": [0, 1, 2**33]}, "three Q32"),
        ({"hidden": 5}, "between 0 and the 4 patches"),
        ({"stream": 1 << 16}, "stream"),
        ({"min_cover": 0.0}, "min_cover"),
        ({"epoch": -1}, "epoch"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict, message: str) -> None:
    settings = {"region": torch.zeros(1, 8, 8), "ratio": [0, 0, 0], "seed": 0, "ids": [1], "epoch": 0} | change
    with pytest.raises(ValueError, match=message):
        ops.region_active(settings.pop("region"), (2, 2), settings.pop("ratio"), **settings)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    arguments = (_regions(2), 7, 7, 1000, 0.25, [0, 1 << 31, 0, -1, 0], 3, torch.arange(2), 2, 0, backend)
    torch.library.opcheck(torch.ops.mwm.region_active.default, arguments)
