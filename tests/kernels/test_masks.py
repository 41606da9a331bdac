"""Philox, coverage and sampling in Triton: equal to the oracle bit for bit."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops.constants import LOG2_TABLE
from mwm.ops.sample_active import _log2_computed, _log2_table

OPS = Path(__file__).resolve().parents[1] / "ops"
_spec = importlib.util.spec_from_file_location("mwm_tests_write_golden", OPS / "write_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def test_words_equal_the_oracle(device: str) -> None:
    ids = torch.tensor([0, 1, 5, 2**32 - 1, 7, 7])[::2]
    for seed in (0, 1, 2**63 + 5, 2**64 - 1):
        for count in (0, 1, 49, 1030):
            for epoch, view, stream in ((0, 0, 0), (2**32 - 1, 65535, 65535)):
                words = ops.random_words(seed, ids.to(device), epoch, view, stream, count, backend="triton")
                assert torch.equal(words.cpu(), ops.random_words(seed, ids, epoch, view, stream, count, backend="reference"))


def test_an_id_out_of_range_is_a_device_side_assertion(refused: type[Exception]) -> None:
    with pytest.raises(refused, match="ids must be integers"):
        ops.random_words(0, [1, 2**32], 0, 0, 0, 4, backend="triton")


def _coverage(region: Tensor, grid: tuple[int, int], device: str, **settings: float) -> tuple[Tensor, Tensor]:
    expected = ops.region_coverage(region, grid, **settings, backend="reference")
    found = ops.region_coverage(region.to(device), grid, **settings, backend="triton")
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])
    return expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "grid"), [((14, 21), (7, 7)), ((64, 96), (2, 3)), ((5, 3), (5, 1)), ((9, 9), (1, 1)), ((32, 35), (4, 5)), ((40, 40), (20, 20))])
def test_coverage_equals_the_oracle(size: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    region = (torch.rand(4, *size) * 1.4 - 0.2).to(dtype)  # also beyond [0, 1]: clamped
    region[1] = 0
    region[2] = 1
    region[3] = (torch.rand(*size) < 0.02).to(dtype) * 0.4  # claims
    inside, _ = _coverage(region, grid, device)
    assert not inside[1].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_coverage_rounds_half_to_even_at_every_step_of_eight_bits(dtype: torch.dtype, device: str) -> None:
    middle = (torch.arange(256, dtype=torch.float64) + 0.5) / 255
    values = torch.cat([middle, middle - 1e-7, middle + 1e-7, torch.arange(256) / 255]).to(dtype).reshape(4, 16, 16)
    _coverage(values, (16, 16), device)


def test_coverage_of_infinities_bools_and_any_strides(device: str) -> None:
    region = torch.rand(3, 8, 12)
    region[0, 0, 0], region[0, 7, 11] = torch.inf, -torch.inf
    wide = torch.full((3, 8, 24), torch.nan)
    wide[..., ::2] = region
    for other in (region, wide[..., ::2], region.permute(2, 0, 1).contiguous().permute(1, 2, 0), region[:1].expand(3, 8, 12), region < 0.3, region[:0]):
        _coverage(other, (2, 3), device)


@pytest.mark.parametrize("grid", [(2, 2), (30, 30)])
def test_a_region_that_reaches_no_patch_claims_its_best_the_lowest_on_ties(grid: tuple[int, int], device: str) -> None:
    region = torch.zeros(4, grid[0] * 3, grid[1] * 3)
    region[0, 4, 4] = 1  # one pixel of nine
    region[1, 0, 4], region[1, 5, 0] = 0.5, 0.5  # a tie
    region[2, 0, 0] = 0.001  # rounds to zero: an empty region claims nothing
    region[3, :3, :3] = 1
    inside, _ = _coverage(region, grid, device)
    assert inside.flatten(1).sum(1).tolist() == [1, 1, 0, 1]


def test_coverage_reads_regions_beyond_2_31_elements(device: str) -> None:
    """Only the pages that are touched exist: the last patch of a map of 2.2e9 pixels."""
    if device != "cpu":
        pytest.skip("the map of the test has memory on paper only; on a GPU it would need it")
    huge = torch.empty(1 << 31 + 1, dtype=torch.uint8)
    region = huge.as_strided((2, 2, 4), ((1 << 31) + 4096, 1 << 16, 1)).view(torch.bool)
    region[0] = False
    region[1] = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    _coverage(region, (1, 2), device)


def test_nan_in_a_region_is_a_device_side_assertion(refused: type[Exception]) -> None:
    region = torch.zeros(2, 4, 4)
    region[1, 3, 3] = torch.nan
    with pytest.raises(refused, match="contains NaN"):
        ops.region_coverage(region, (2, 2), backend="triton")


@pytest.mark.parametrize("name", golden.inputs())
def test_golden_masks_never_change(name: str, device: str) -> None:
    arguments = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in golden.inputs()[name].items()}
    active = ops.sample_active(arguments.pop("strata"), arguments.pop("ratio", None), backend="triton", **arguments)
    assert golden.as_text(active.cpu()) == json.loads((OPS / "golden_masks.json").read_text())["cases"][name]


@pytest.mark.parametrize("number", range(12))
def test_masks_equal_the_oracle_bit_for_bit(number: int, device: str) -> None:
    random.seed(number)
    torch.manual_seed(number)
    rows, columns = random.choice([(1, 1), (1, 3), (7, 7), (5, 6), (11, 13), (1, 2), (17, 17)])
    batch, kinds = random.choice([0, 1, 2, 5]) if rows < 10 else 1, random.choice([1, 2, 3, 9])
    dtype = random.choice([torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
    strata = torch.randint(0, random.randint(1, kinds), (rows * columns, batch)).t()
    strata = (strata % 2).bool() if dtype == torch.bool and kinds > 1 else strata.to(torch.uint8 if dtype == torch.bool else dtype)
    settings = {"grid": (rows, columns), "seed": random.randrange(2**64), "ids": torch.randint(0, 2**32, (batch,)), "epoch": random.randrange(2**32),
                "view": random.randrange(65536)}
    amounts = {}
    if random.random() < 0.4:
        sizes = torch.stack([(strata.long() == kind).sum(1) for kind in range(kinds)], 1)
        amounts["hidden"] = (torch.rand(sizes.shape) * (sizes + 1)).long().clamp(max=sizes)
    else:
        amounts["ratio"] = torch.randint(0, 2**32 + 1, (batch, kinds) if random.random() < 0.5 else (kinds,))
        amounts["ratio"][..., 0] = random.choice([0, 2**32, 2**31, 1, 2**32 - 1])
    if random.random() < 0.5:
        settings["weights"] = torch.rand(strata.shape) * (torch.rand(strata.shape) < 0.7)
    expected = ops.sample_active(strata, **amounts, **settings, backend="reference")
    there = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in {**amounts, **settings}.items()}
    assert torch.equal(ops.sample_active(strata.to(device), **there, backend="triton").cpu(), expected)


@pytest.mark.parametrize(("image", "first", "second", "rank"), [(10983128, 26, 33, 36), (13716629, 0, 32, 11)])
def test_of_two_equal_words_the_lower_index_is_hidden_first(image: int, first: int, second: int, rank: int, device: str) -> None:
    strata = torch.zeros((1, 49), dtype=torch.int64, device=device)
    for hidden, expected in ((rank, (True, True)), (rank + 1, (False, True)), (rank + 2, (False, False))):
        active = ops.sample_active(strata, hidden=torch.tensor([hidden]), grid=(7, 7), seed=0, ids=[image], epoch=0, backend="triton").flatten()
        assert (bool(active[first]), bool(active[second])) == expected
        assert int((~active).sum()) == hidden


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strata": torch.full((2, 4), 2)}, r"strata must lie in"),
        ({"strata": torch.full((2, 4), 2**32)}, r"strata must lie in"),
        ({"strata": torch.full((2, 4), -1)}, r"strata must lie in"),
        ({"ratio": torch.tensor([-1, 0])}, "Q32"),
        ({"ratio": torch.tensor([0, 2**32 + 1])}, "Q32"),
        ({"ratio": None, "hidden": torch.tensor([5, 0])}, "hidden must be between 0"),
        ({"ratio": None, "hidden": torch.tensor([0, 1])}, "hidden must be between 0"),
        ({"ids": [1, 2**32]}, "ids"),
    ],
)
def test_values_out_of_range_are_device_side_assertions(change: dict, message: str, refused: type[Exception]) -> None:
    settings = {"strata": torch.zeros((2, 4), dtype=torch.int64), "ratio": ops.to_q32([0.5, 0.5]), "grid": (2, 2), "seed": 0, "ids": [0, 1], "epoch": 0} | change
    with pytest.raises(refused, match=message):
        ops.sample_active(settings.pop("strata"), settings.pop("ratio"), **settings, backend="triton")


@pytest.mark.parametrize(("hidden", "dtype"), [*((29, dtype) for dtype in (*FLOATS, torch.bool)), (None, torch.float32), (0, torch.float32), (49, torch.float32)])
def test_masks_at_once_equal_the_two_steps(hidden: int | None, dtype: torch.dtype, device: str) -> None:
    region = torch.rand(6, 28, 28)
    region[torch.arange(28) >= torch.randint(0, 28, (6, 1, 1)).expand(6, 28, 28)] = 0
    region[0], region[1, 3, 3:5] = 0, 1
    region = (region > 0.5) if dtype == torch.bool else region.to(dtype)
    ids = torch.tensor([0, 5, 2**32 - 1, 7, 8, 9])
    settings = {"ratio": [1 << 31, 3_000_000_001, 2**32], "hidden": hidden, "stream": 64, "seed": 2**64 - 3, "epoch": 2**32 - 1, "view": 65535}
    expected = ops.region_active(region, (7, 7), ids=ids, **settings, backend="reference")
    for there in (region.to(device), region.to(device).transpose(1, 2).contiguous().transpose(1, 2)):
        found = ops.region_active(there, (7, 7), ids=ids.to(device), **settings, backend="triton")
        assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (8, 8), (9, 10)])
def test_masks_at_once_on_any_grid(grid: tuple[int, int], device: str) -> None:
    region = (torch.rand(3, 4 * grid[0], 4 * grid[1]) < 0.2).float()
    settings = {"ratio": ops.to_q32([0.4, 0.8, 0.5]).tolist(), "seed": 1, "ids": [3, 4, 5], "epoch": 0}
    expected = ops.region_active(region, grid, **settings, backend="reference")
    found = ops.region_active(region.to(device), grid, **settings, backend="triton")
    assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])


def test_masks_at_once_refuse_nan_and_wrong_ids(refused: type[Exception]) -> None:
    settings = {"ratio": [0, 0, 0], "seed": 1, "epoch": 0, "backend": "triton"}
    with pytest.raises(refused, match="contains NaN"):
        ops.region_active(torch.full((1, 4, 4), torch.nan), (2, 2), ids=[0], **settings)
    with pytest.raises(refused, match="ids must be integers"):
        ops.region_active(torch.zeros(1, 4, 4), (2, 2), ids=[2**32], **settings)


def test_the_table_of_logarithms_made_on_the_device_is_the_shared_one(device: str) -> None:
    assert _log2_computed(torch.device(device)).tolist() == list(LOG2_TABLE)
    assert _log2_table(torch.device(device)).tolist() == list(LOG2_TABLE)
