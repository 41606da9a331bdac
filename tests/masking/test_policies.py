"""Claims about every registered policy: with the settings of `SETTINGS`, and with its defaults where it is not named there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import mwm
from mwm.masking import Policy, describe_policy, list_policies, policy_from_dict
from mwm.masking.registry import settings_of

GRID = (7, 7)
IDS = torch.tensor([0, 1, 7, 2**31, 2**32 - 1, 123456789])
GOLDEN = Path(__file__).with_name("golden_masks.json")

SETTINGS = {
    "region 0.8/0.4": ("region", {"preset": "0.8/0.4", "empty_share": 0.5}),
    "region 0.7/0.3": ("region", {"preset": "0.7/0.3", "empty_share": 0.5}),
    "region 0.6/0.2": ("region", {"preset": "0.6/0.2", "empty_share": 0.5}),
    "region empty low": ("region", {"high": 0.75, "low": 0.25, "empty": "low"}),
    "region overall": ("region", {"overall": 0.6}),
    "region overall high": ("region", {"overall": 0.4, "high": 0.9, "min_cover": 0.5}),
    "region soft": ("region", {"high": 0.8, "low": 0.4, "empty_share": 0.5, "soft": True}),
    "uniform 0.6": ("uniform", {"mask_ratio": 0.6}),
    "uniform overall": ("uniform", {"overall": 0.6}),
    "uniform match": ("uniform", {"match": ("region", {"high": 0.8, "low": 0.4, "empty_share": 0.5})}),
    "uniform match overall": ("uniform", {"match": ("region", {"overall": 0.45})}),
    "foreground": ("foreground", {"match": ("region", {"high": 0.8, "low": 0.4, "empty_share": 0.5})}),  # with its second map in test_foreground.py
}
SETTINGS |= {name: (name, {}) for name in list_policies() if name not in {tested for tested, _ in SETTINGS.values()}}


def build(settings: tuple[str, dict]) -> Policy:
    name, fields = settings
    return mwm.create_policy(name, **{key: build(value) if isinstance(value, tuple) else value for key, value in fields.items()})


def regions(size: int = 224) -> torch.Tensor:
    """A box, a soft blob, a dot smaller than a patch, an empty region, a full one, a box at the edge. [6, size, size]"""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    maps = torch.zeros(6, size, size)
    maps[0, size // 4 : size // 2, size // 3 : size // 2] = 1
    maps[1] = torch.exp(-3 * (rows**2 + columns**2))
    maps[2, 5:8, size - 9 : size - 5] = 1
    maps[4] = 1
    maps[5, size // 2 :, : size // 5] = 0.9
    return maps


@pytest.fixture(params=SETTINGS, ids=lambda name: name.replace(" ", "-"))
def policy(request: pytest.FixtureRequest) -> Policy:
    return build(SETTINGS[request.param])


def draw(policy: Policy, region: torch.Tensor | None = None, ids: torch.Tensor = IDS, seed: int = 3, epoch: int = 2, view: int = 0, grid: tuple[int, int] = GRID) -> torch.Tensor:
    return policy(regions() if region is None else region, grid=grid, seed=seed, ids=ids, epoch=epoch, view=view)


def as_rows(active: torch.Tensor) -> list[str]:
    """One string of 0 (hidden) and 1 (visible) per image."""
    return ["".join("01"[int(patch)] for patch in mask.flatten()) for mask in active]


def test_mask_is_bool_on_the_grid(policy: Policy) -> None:
    active = draw(policy)
    assert active.dtype == torch.bool and active.shape == (6, 7, 7)
    assert draw(policy, regions(192)[:, :96], grid=(3, 6)).shape == (6, 3, 6)


def test_same_arguments_same_mask_and_each_argument_matters(policy: Policy) -> None:
    active = draw(policy)
    assert torch.equal(active, draw(policy))
    for change in ({"seed": 4}, {"epoch": 3}, {"view": 1}, {"ids": IDS.roll(1)}):
        assert not torch.equal(active, draw(policy, **change)), change


def test_mask_does_not_depend_on_batch_or_order(policy: Policy) -> None:
    active, region = draw(policy), regions()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(draw(policy, region[order], IDS[order]), active[order])
    for index in range(6):
        assert torch.equal(draw(policy, region[index : index + 1], IDS[index : index + 1])[0], active[index])
    assert draw(policy, region[:0], IDS[:0]).shape == (0, 7, 7)


def test_global_random_state_is_neither_read_nor_moved(policy: Policy) -> None:
    active = draw(policy)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(draw(policy), active)
    assert torch.equal(torch.get_rng_state(), state)


def test_visible_is_true_where_it_is_given(policy: Policy) -> None:
    for grid, size in ((GRID, 224), ((4, 4), 224), ((10, 10), 220)):
        counts = torch.cat([draw(policy, regions(size), epoch=epoch, grid=grid).flatten(1).sum(1) for epoch in range(5)])
        visible = policy.visible(grid)
        if visible is not None:
            assert (counts == visible).all()


def test_inside_grids_of_a_loader_worker_give_the_same_masks(policy: Policy) -> None:
    if getattr(policy, "soft", False):
        with pytest.raises(ValueError, match="soft=True"):
            draw(policy, policy.inside(regions(), GRID))
        return
    assert torch.equal(draw(policy, policy.inside(regions(), GRID)), draw(policy))


def test_hidden_share_is_the_expectation_of_the_masks(policy: Policy) -> None:
    soft = getattr(policy, "soft", False)  # soft masks are not drawn from inside grids
    inside = policy.inside(regions(), GRID)
    epochs = 60 if soft else 400
    hidden = torch.zeros(6, dtype=torch.float64)
    for epoch in range(epochs):
        hidden += (~draw(policy, regions() if soft else inside, epoch=epoch)).flatten(1).double().mean(1)
    # At most two strata of an image round at random, each by a coin of variance at most 1/4.
    sigma = (2 * 0.25) ** 0.5 / 49 / epochs**0.5
    assert (hidden / epochs - policy.hidden_share(inside)).abs().max() <= 5 * sigma


def test_settings_survive_a_config_file(policy: Policy) -> None:
    plain = json.loads(json.dumps(policy.to_dict()))
    again = policy_from_dict(plain)
    assert again == policy and hash(again) == hash(policy)
    assert torch.equal(draw(again), draw(policy))


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_equal_the_golden_file(name: str) -> None:
    """A difference here breaks the resume of every run that was started before; raise the sampler's version then."""
    golden = json.loads(GOLDEN.read_text())
    assert name in golden, "There are no golden masks of a new policy: run python tests/masking/write_golden.py once."
    assert as_rows(draw(build(SETTINGS[name]))) == golden[name]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ids": IDS[:5]}, "ids must be"),
        ({"ids": IDS - 1}, r"ids must be in \[0, 2\^32\)"),
        ({"ids": IDS.float()}, "ids must be integers"),
        ({"grid": (5, 7)}, "5x7.*224x224"),
        ({"grid": (0, 7)}, "at least one patch"),
        ({"grid": 7}, "two whole numbers"),
        ({"region": regions()[:, :, :192]}, "7x7.*224x192"),
        ({"region": regions()[:, :220, :220]}, "7x7.*220x220"),
        ({"region": regions()[0]}, r"\[B, H, W\]"),
        ({"region": regions()[:, None]}, r"\[B, H, W\]"),
        ({"region": (regions() * 255).to(torch.uint8)}, "Divide a 0 … 255 mask"),
        ({"region": regions() / 0}, "NaN"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"epoch": -1}, "epoch must be at least 0"),
    ],
)
def test_bad_arguments_end_in_one_sentence(change: dict, sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence) as caught:
        draw(build(SETTINGS["region 0.8/0.4"]), **change)
    assert "\n" not in str(caught.value)


def test_region_policy_refuses_to_work_without_regions() -> None:
    with pytest.raises(ValueError, match="got None"):
        mwm.create_policy("region")(None, grid=GRID, seed=0, ids=IDS, epoch=0)


def test_uniform_needs_no_regions() -> None:
    policy = mwm.create_policy("uniform", mask_ratio=0.6)
    alone = policy(None, grid=GRID, seed=3, ids=IDS, epoch=2)
    assert torch.equal(alone, draw(policy))
    assert torch.equal(alone, policy(None, grid=GRID, seed=3, ids=IDS.tolist(), epoch=2))


@pytest.mark.parametrize("name", list_policies())
def test_a_policy_is_described_with_its_settings_and_their_defaults(name: str) -> None:
    words = describe_policy(name)
    assert "<" not in words and "\n" not in words
    assert re.findall(r"(\w+)=", words) == settings_of(name)


def test_a_description_says_which_policy_is_the_default_of_a_setting() -> None:
    assert describe_policy("foreground").endswith("settings: match=region")
    assert "min_cover=0.25" in describe_policy("region") and "empty='mean'" in describe_policy("region")
