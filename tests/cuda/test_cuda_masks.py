"""Coverage, random words, masks and plans of the CUDA sources: equal to the reference bit for bit."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import harness
import pytest
import torch
from emulator import Target

from mwm import ops

OPS = Path(__file__).resolve().parents[1] / "ops"
_spec = importlib.util.spec_from_file_location("mwm_tests_write_golden", OPS / "write_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)
MASKS = harness.masks()


@pytest.mark.parametrize("name", golden.inputs())
def test_golden_masks_are_those_of_every_backend(name: str, target: Target) -> None:
    target.require("sample_active", torch.int64)
    stored = json.loads((OPS / "golden_masks.json").read_text())["cases"][name]
    arguments = {key: value.to(target.device) if isinstance(value, torch.Tensor) else value for key, value in golden.inputs()[name].items()}
    active = ops.sample_active(arguments.pop("strata"), arguments.pop("ratio", None), backend=target.backend, **arguments)
    assert golden.as_text(active.cpu()) == stored


def _fuzz_case(number: int) -> tuple[tuple, dict]:
    random.seed(number)
    generator = torch.Generator().manual_seed(number)
    rows, columns = random.choice([(1, 1), (1, 3), (7, 7), (5, 6), (13, 11), (14, 14), (1, 2), (40, 41), (50, 50)])
    batch = random.choice([0, 1, 2, 5]) if rows < 50 else 1
    kinds = random.choice([1, 2, 3, 9, 70]) if rows < 50 else random.choice([1, 2])
    strata = torch.randint(0, random.randint(1, min(kinds, 5)), (batch, rows * columns), generator=generator)
    strata = strata.to(random.choice([torch.int64, torch.int32, torch.int16, torch.uint8]))
    settings = {"grid": (rows, columns), "seed": random.randrange(2**64), "ids": torch.randint(0, 2**32, (batch,), generator=generator),
                "epoch": random.randrange(2**32), "view": random.randrange(65536)}
    if random.random() < 0.4:
        sizes = torch.stack([(strata == kind).sum(1) for kind in range(kinds)], 1)
        ratio, settings["hidden"] = None, (torch.rand(sizes.shape, generator=generator) * (sizes + 1)).long().clamp(max=sizes)
    else:
        ratio = torch.randint(0, 2**32 + 1, (batch, kinds) if random.random() < 0.5 else (kinds,), generator=generator)
        ratio[..., 0] = random.choice([0, 2**32, 2**31, 1, 2**32 - 1])
    if random.random() < 0.5:
        settings["weights"] = torch.rand(strata.shape, generator=generator) * (torch.rand(strata.shape, generator=generator) < 0.7)
    return (strata, ratio), settings


@pytest.mark.parametrize("number", range(40))
def test_masks_equal_the_reference_bit_for_bit(number: int, quick: Target) -> None:
    quick.require("sample_active", torch.int64)
    arguments, settings = _fuzz_case(number)
    expected = ops.sample_active(*arguments, **settings, backend="reference")

    def move(value: object) -> object:
        return value.to(quick.device) if isinstance(value, torch.Tensor) else value

    found = ops.sample_active(*map(move, arguments), **{key: move(value) for key, value in settings.items()}, backend=quick.backend)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(("image", "first", "second", "rank"), [(10983128, 26, 33, 36), (14251478, 19, 42, 34)])
def test_of_two_equal_words_the_lower_index_is_hidden_first(image: int, first: int, second: int, rank: int, quick: Target) -> None:
    """Collisions of 32-bit words among 49; in the wide grid the other patches belong to a stratum of their own."""
    quick.require("sample_active", torch.int64)
    for patches in (49, 4900):
        strata = (torch.arange(patches) >= 49).long()[None].to(quick.device)
        for hidden, expected in ((rank, (True, True)), (rank + 1, (False, True)), (rank + 2, (False, False))):
            counts = torch.tensor([hidden, 0], device=quick.device)
            active = ops.sample_active(strata, hidden=counts, grid=(1, patches), seed=0, ids=[image], epoch=0, backend=quick.backend).flatten()
            assert (bool(active[first]), bool(active[second])) == expected
            assert int((~active).sum()) == hidden


@pytest.mark.parametrize("n", [0, 1, 4, 5, 130])
def test_random_words_equal_the_reference(n: int, quick: Target) -> None:
    quick.require("random_words", torch.int64)
    ids = torch.randint(0, 2**32, (5,))
    arguments = (2**63 + 12345, 2**32 - 1, 65535, 65535, n)
    expected = ops.random_words(arguments[0], ids, *arguments[1:], backend="reference")
    assert torch.equal(ops.random_words(arguments[0], ids.to(quick.device), *arguments[1:], backend=quick.backend).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool])
@pytest.mark.parametrize(("size", "grid"), [((14, 21), (7, 7)), ((64, 96), (2, 3)), ((5, 3), (5, 1)), ((9, 9), (1, 1)), ((70, 70), (1, 2)), ((80, 40), (40, 20))])
def test_coverage_equals_the_reference(size: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype, target: Target) -> None:
    target.require("region_coverage", dtype)
    region = torch.rand(4, *size) * 1.4 - 0.2  # also beyond [0, 1]: clamped
    region = region > 0.9 if dtype == torch.bool else region.to(dtype)
    region[1], region[2], region[3] = 0, 1, 0
    region[3, -1, -1] = 1  # reaches no patch, unless patches are small: claims one
    for given in (region, region.transpose(1, 2).contiguous().transpose(1, 2), region[:, :, :1].expand(4, *size)):
        expected = ops.region_coverage(given, grid, backend="reference")
        found = ops.region_coverage(given.to(target.device), grid, backend=target.backend)
        assert torch.equal(found[1].cpu(), expected[1])
        assert torch.equal(found[0].cpu(), expected[0])


def test_rounding_is_half_to_even_at_every_step_of_eight_bits(quick: Target) -> None:
    quick.require("region_coverage")
    middle = (torch.arange(256, dtype=torch.float64) + 0.5) / 255
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        values = torch.cat([middle, middle - 1e-7, middle + 1e-7, torch.arange(256) / 255]).to(dtype).reshape(1, 32, 32)
        expected = ops.region_coverage(values, (32, 32), backend="reference")
        if not (dtype == torch.float64 and quick.backend == "triton"):
            assert torch.equal(ops.region_coverage(values.to(quick.device), (32, 32), backend=quick.backend)[1].cpu(), expected[1])


@pytest.mark.parametrize("name", MASKS)
def test_plans_equal_the_reference(name: str, target: Target) -> None:
    target.require("build_plan", torch.bool)
    active = MASKS[name]
    found = ops.build_plan(active.to(target.device), 4, backend=target.backend)
    expected = ops.build_plan(active, 4, backend="reference")
    for mine, other in zip(found.tensors(), expected.tensors(), strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine.cpu(), other)


def test_plans_of_many_and_of_large_masks(quick: Target) -> None:
    quick.require("build_plan", torch.bool)
    for shape in ((2500, 1, 2), (3, 33, 65)):
        active = torch.rand(shape) < 0.3
        strided = active.permute(2, 0, 1).contiguous().permute(1, 2, 0).to(quick.device)
        found = ops.build_plan(strided, 4, backend=quick.backend)
        assert torch.equal(found.coords.cpu(), active.nonzero().int())
        assert found.offsets.tolist() == [0, *active.flatten(1).sum(1).cumsum(0).tolist()]


@pytest.mark.parametrize("visible", [0, 5, 12])
def test_a_known_count_needs_one_launch_and_gives_the_same_plan(visible: int, target: Target) -> None:
    target.require("build_plan", torch.bool)
    active = torch.zeros((9, 12), dtype=torch.bool)
    active[:, torch.randperm(12)[:visible]] = True
    active = active.reshape(9, 3, 4).to(target.device)
    found = ops.build_plan(active, 4, visible=visible, backend=target.backend)
    for mine, other in zip(found.tensors(), ops.build_plan(active, 4, backend=target.backend).tensors(), strict=True):
        assert torch.equal(mine, other)


class TestDeviceSideAssertions:
    """What only the device can know ends the launch there; on a GPU the context would be lost, so the emulation shows it."""

    @pytest.fixture(autouse=True)
    def _emulated(self, emulated: object) -> object:
        import emulator

        with emulator.backend_on_cpu(emulated):
            yield

    def test_of_a_wrong_count(self) -> None:
        active = torch.ones((3, 2, 2), dtype=torch.bool)
        active[1, 0, 0] = False
        with pytest.raises(RuntimeError, match="device-side assertion: build_plan: visible must be"):
            ops.build_plan(active, 4, visible=4, backend="cuda")

    def test_of_nan_in_a_region(self) -> None:
        region = torch.zeros(2, 8, 8)
        region[1, 7, 7] = torch.nan
        with pytest.raises(RuntimeError, match="device-side assertion: region_coverage: region contains NaN"):
            ops.region_coverage(region, (2, 2), backend="cuda")

    @pytest.mark.parametrize("patches", [4, 4096])
    @pytest.mark.parametrize(("change", "message"), [
        ({"strata": 2}, "strata must lie"), ({"strata": -1}, "strata must lie"), ({"ids": 2**32}, "ids must be integers"),
        ({"ratio": 2**32 + 1}, "Q32"), ({"hidden": 5000}, "hidden must be between 0"),
    ])
    def test_of_numbers_out_of_range(self, change: dict, message: str, patches: int) -> None:
        strata = torch.full((1, patches), change.get("strata", 0))
        ratio = torch.tensor([change.get("ratio", 0), 0])
        amount = {"hidden": torch.tensor([change["hidden"], 0])} if "hidden" in change else {"ratio": ratio}
        with pytest.raises(RuntimeError, match=message):
            ops.sample_active(strata, **amount, grid=(1, patches), seed=0, ids=[change.get("ids", 0)], epoch=0, backend="cuda")


def _regions(batch: int, height: int, width: int) -> torch.Tensor:
    region = torch.rand(batch, height, width) * (torch.rand(batch, 1, 1) < 0.8)
    return torch.where(torch.arange(width) < torch.randint(0, width, (batch, 1, 1)), region, 0)


@pytest.mark.parametrize("hidden", [None, 0, 20, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_regions_become_masks_in_one_launch_as_in_two_steps(dtype: torch.dtype, hidden: int | None, target: Target) -> None:
    target.require("region_active", dtype)
    region = _regions(12, 28, 56)
    region = region > 0.5 if dtype == torch.bool else region.to(dtype)
    settings = {"hidden": hidden, "stream": 64, "seed": 2**64 - 5, "epoch": 3, "view": 1, "min_cover": 0.3}
    ratio, ids = ops.to_q32([0.4, 0.8, 0.55]).tolist(), torch.randint(0, 2**32, (12,))
    expected = ops.region_active(region, (7, 7), ratio, ids=ids, backend="reference", **settings)
    found = ops.region_active(region.to(target.device), (7, 7), ratio, ids=ids.to(target.device), backend=target.backend, **settings)
    assert torch.equal(found[1].cpu(), expected[1])
    assert torch.equal(found[0].cpu(), expected[0])
    if hidden is not None:
        assert ((~found[0]).flatten(1).sum(1) == hidden).all()
