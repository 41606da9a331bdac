from __future__ import annotations

import importlib.util
import json
import random
import time
from fractions import Fraction
from pathlib import Path

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("mwm_tests_write_golden", HERE / "write_golden.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


def _counts(active: Tensor, strata: Tensor, kind: int) -> Tensor:
    return (~active.flatten(1) & (strata == kind)).sum(1)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", golden.inputs())
def test_golden_masks_never_change(name: str, backend: str, isa: str) -> None:
    stored = json.loads((HERE / "golden_masks.json").read_text())
    assert stored["sampler_version"] == ops.SAMPLER_VERSION
    assert golden.as_text(golden.draw(name, backend)) == stored["cases"][name]


def _fuzz_case(number: int) -> tuple[tuple, dict]:
    random.seed(number)
    torch.manual_seed(number)
    rows, columns = random.choice([(1, 1), (1, 3), (7, 7), (5, 6), (13, 11), (14, 14), (1, 2), (40, 41)])
    batch = random.choice([0, 1, 2, 5])
    kinds = random.choice([1, 2, 3, 9])
    dtype = random.choice([torch.int64, torch.int32, torch.int16, torch.uint8])
    used = random.randint(1, kinds)  # some strata stay empty
    strata = torch.randint(0, used, (batch, rows * columns)).to(dtype)
    per_image = random.random() < 0.5
    settings = {
        "grid": (rows, columns),
        "seed": random.randrange(2**64),
        "ids": torch.randint(0, 2**32, (batch,)),
        "epoch": random.randrange(2**32),
        "view": random.randrange(65536),
    }
    if random.random() < 0.4:
        sizes = torch.stack([(strata == kind).sum(1) for kind in range(kinds)], 1)
        settings["hidden"] = (torch.rand(sizes.shape) * (sizes + 1)).long().clamp(max=sizes)
        ratio = None
    else:
        ratio = torch.randint(0, 2**32 + 1, (batch, kinds) if per_image else (kinds,))
        ratio[..., 0] = random.choice([0, 2**32, 2**31, 1, 2**32 - 1])
    if random.random() < 0.5:
        settings["weights"] = torch.rand(strata.shape) * (torch.rand(strata.shape) < 0.7)
    return (strata, ratio), settings


@pytest.mark.parametrize("number", range(60))
def test_native_masks_equal_the_reference_bit_for_bit(number: int, isa: str) -> None:
    arguments, settings = _fuzz_case(number)
    expected = ops.sample_active(*arguments, **settings, backend="reference")
    for count in (1, 2):
        with harness.num_threads(count):
            assert torch.equal(ops.sample_active(*arguments, **settings, backend="cpu"), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_counts_are_floor_or_ceil_of_the_expected_number(weighted: bool) -> None:
    strata = torch.randint(0, 2, (200, 49))
    ratio = ops.to_q32([0.4, 0.8])
    weights = torch.rand(200, 49) if weighted else None
    active = ops.sample_active(strata, ratio, grid=(7, 7), seed=3, ids=torch.arange(200), epoch=0, weights=weights)
    for kind in range(2):
        sizes = (strata == kind).sum(1)
        exact = sizes.double() * [0.4, 0.8][kind]
        hidden = _counts(active, strata, kind)
        assert ((hidden == exact.floor()) | (hidden == exact.floor() + 1)).all()


def test_exact_counts_are_exact() -> None:
    strata = torch.randint(0, 3, (50, 49))
    sizes = torch.stack([(strata == kind).sum(1) for kind in range(3)], 1)
    wanted = sizes // 2
    active = ops.sample_active(strata, hidden=wanted, grid=(7, 7), seed=3, ids=torch.arange(50), epoch=0)
    assert torch.equal(torch.stack([_counts(active, strata, kind) for kind in range(3)], 1), wanted)


def test_every_patch_is_hidden_with_its_probability() -> None:
    """40,000 draws of one image, n * p not integral; every inclusion frequency within five sigma."""
    draws = 40_000
    strata = (torch.arange(20) < 7).long().expand(draws, 20)
    active = ops.sample_active(strata, ops.to_q32([0.35, 0.61]), grid=(4, 5), seed=0, ids=torch.arange(draws), epoch=0)
    hidden = (~active.flatten(1)).double().mean(0)
    expected = torch.where(strata[0] == 1, 0.61, 0.35)
    assert ((hidden - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_weighted_order_follows_drawing_one_by_one() -> None:
    """First of three patches hidden with probability w / sum(w), by the exponential race."""
    draws = 60_000
    weights = torch.tensor([0.1, 0.3, 0.6]).expand(draws, 3)
    strata = torch.zeros((draws, 3), dtype=torch.int64)
    active = ops.sample_active(strata, hidden=torch.tensor([1]), grid=(1, 3), seed=0, ids=torch.arange(draws), epoch=0, weights=weights)
    share = (~active.flatten(1)).double().mean(0)
    expected = weights[0].double()
    assert ((share - expected).abs() < 5 * (expected * (1 - expected) / draws).sqrt()).all()


def test_weight_zero_is_hidden_last_and_counts_stay_exact() -> None:
    weights = torch.tensor([[0.0, 1e-9, 1.0, 0.0, 0.5]]).repeat(300, 1)
    strata = torch.zeros((300, 5), dtype=torch.int64)
    for hidden in range(6):
        active = ops.sample_active(strata, hidden=torch.tensor([hidden]), grid=(1, 5), seed=1, ids=torch.arange(300), epoch=0, weights=weights)
        gone = ~active.flatten(1)
        assert (gone.sum(1) == hidden).all()
        if hidden <= 3:
            assert not gone[:, [0, 3]].any()
        else:
            assert gone[:, [1, 2, 4]].all()


def test_equal_weights_keep_every_patch_equally_likely() -> None:
    draws = 20_000
    strata = torch.zeros((draws, 6), dtype=torch.int64)
    active = ops.sample_active(
        strata, hidden=torch.tensor([2]), grid=(2, 3), seed=1, ids=torch.arange(draws), epoch=0, weights=torch.full((draws, 6), 0.37)
    )
    share = (~active.flatten(1)).double().mean(0)
    assert ((share - 1 / 3).abs() < 5 * (2 / 9 / draws) ** 0.5).all()


def test_a_mask_depends_on_seed_id_epoch_view_and_on_nothing_else() -> None:
    strata = torch.randint(0, 2, (1, 49)).expand(16, 49)
    settings = {"grid": (7, 7), "seed": 3, "epoch": 2}
    ratio = ops.to_q32([0.5, 0.5])
    ids = torch.randperm(1000)[:16]
    batch = ops.sample_active(strata, ratio, ids=ids, **settings)
    alone = torch.cat([ops.sample_active(strata[:1], ratio, ids=ids[i : i + 1], **settings) for i in range(16)])
    assert torch.equal(batch, alone)
    for change in ({"seed": 4}, {"epoch": 3}, {"view": 1}):
        assert not torch.equal(ops.sample_active(strata, ratio, ids=ids, **{**settings, **change}), batch)


@pytest.mark.parametrize(("image", "first", "second", "rank"), [(10983128, 26, 33, 36), (13716629, 0, 32, 11), (14251478, 19, 42, 34)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_of_two_equal_words_the_lower_index_is_hidden_first(image: int, first: int, second: int, rank: int, backend: str, isa: str) -> None:
    """Collisions of 32-bit words among 49, found by search over 14 million ids; the count must split the pair."""
    words = ops.random_words(0, [image], 0, 0, 0, 49)[0]
    assert words[first] == words[second]
    assert int((words < words[first]).sum()) == rank
    strata = torch.zeros((1, 49), dtype=torch.int64)
    for hidden, expected in ((rank, (True, True)), (rank + 1, (False, True)), (rank + 2, (False, False))):
        active = ops.sample_active(strata, hidden=torch.tensor([hidden]), grid=(7, 7), seed=0, ids=[image], epoch=0, backend=backend)
        flat = active.flatten()
        assert (bool(flat[first]), bool(flat[second])) == expected
        assert int((~flat).sum()) == hidden


def test_many_equal_weights_keep_counts_exact() -> None:
    strata = torch.zeros((64, 300), dtype=torch.int64)
    weights = torch.full((64, 300), 65535, dtype=torch.int64)
    for hidden in (1, 150, 299):
        active = ops.sample_active(strata, hidden=torch.tensor([hidden]), grid=(15, 20), seed=0, ids=torch.arange(64), epoch=0, weights=weights)
        assert ((~active).flatten(1).sum(1) == hidden).all()


def test_strided_inputs_are_read_right() -> None:
    strata = torch.randint(0, 2, (49, 4)).t()
    weights = torch.rand(49, 4).t()
    ratio = ops.to_q32([0.5, 0.7]).repeat(2)[::2].expand(4, 2)
    settings = {"grid": (7, 7), "seed": 3, "epoch": 2, "ids": torch.arange(8)[::2]}
    found = ops.sample_active(strata, ratio, weights=weights, **settings, backend="cpu")
    again = ops.sample_active(strata.contiguous(), ratio.contiguous(), weights=weights.contiguous(), **settings, backend="cpu")
    assert torch.equal(found, again)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strata": torch.full((2, 4), 2)}, ValueError, r"strata must lie in \[0, 2\)"),
        ({"strata": torch.full((2, 4), -1)}, ValueError, r"strata must lie in \[0, 2\)"),
        ({"strata": torch.zeros(2, 4)}, TypeError, "strata must be integers"),
        ({"strata": torch.zeros((2, 5), dtype=torch.int64)}, ValueError, r"strata must be \[B, L\]"),
        ({"ratio": torch.tensor([0.5, 0.5])}, TypeError, "to_q32"),
        ({"ratio": torch.tensor([-1, 0])}, ValueError, "Q32"),
        ({"ratio": torch.tensor([0, 2**32 + 1])}, ValueError, "Q32"),
        ({"ratio": None}, ValueError, "either ratio"),
        ({"hidden": torch.tensor([1, 1])}, ValueError, "either ratio"),
        ({"ratio": None, "hidden": torch.tensor([5, 0])}, ValueError, "hidden must be between 0"),
        ({"num_strata": 3}, ValueError, "S = 3"),
        ({"ids": [1]}, ValueError, "B = 2"),
        ({"ids": [1, 2**32]}, ValueError, "ids"),
        ({"epoch": 2**32}, ValueError, "epoch"),
        ({"weights": torch.rand(2, 3)}, ValueError, "weights"),
        ({"weights": torch.full((2, 4), torch.nan)}, ValueError, "weights"),
        ({"weights": torch.full((2, 4), 1.5)}, ValueError, "weights"),
        ({"weights": torch.full((2, 4), 70000)}, ValueError, "weights"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict, error: type, message: str, backend: str) -> None:
    settings = {"strata": torch.zeros((2, 4), dtype=torch.int64), "ratio": ops.to_q32([0.5, 0.5]), "grid": (2, 2), "seed": 0, "ids": [0, 1], "epoch": 0}
    settings |= change
    with pytest.raises(error, match=message):
        ops.sample_active(settings.pop("strata"), settings.pop("ratio"), **settings, backend=backend)


def test_q32_rounds_half_to_even_and_refuses_what_is_no_probability() -> None:
    assert ops.to_q32(0.5) == 2**31
    assert ops.to_q32(1.0) == 2**32
    assert ops.to_q32(0.8) == round(Fraction(0.8) * 2**32)
    assert ops.to_q32([0.25, 0]).tolist() == [2**30, 0]
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="ratio must be in"):
            ops.to_q32(bad)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    strata = torch.randint(0, 2, (3, 12))
    for exact, amounts in ((False, ops.to_q32([0.3, 0.6])), (True, torch.tensor([1, 1]))):
        for weights in (None, torch.randint(0, 65536, (3, 12))):
            torch.library.opcheck(torch.ops.mwm.sample_active.default, (strata, amounts, exact, 3, 4, 1, torch.arange(3), 2, 0, weights, backend))


def test_a_thousand_masks_cost_far_less_than_a_python_loop() -> None:
    """1024 masks of 7x7 on one thread against one torch.randperm per image; the margin is wide because the machine may be busy."""
    strata = torch.randint(0, 2, (1024, 49), dtype=torch.uint8)
    ratio, ids = ops.to_q32([0.4, 0.8]), torch.arange(1024)

    def ours() -> None:
        ops.sample_active(strata, ratio, grid=(7, 7), seed=0, ids=ids, epoch=0)

    def loop() -> None:
        for _ in range(1024):
            torch.randperm(49)

    best = {}
    for function in (ours, loop):
        function()
        times = []
        with harness.num_threads(1):
            for _ in range(15):
                start = time.perf_counter()
                function()
                times.append(time.perf_counter() - start)
        best[function.__name__] = min(times)
    assert best["loop"] > 2 * best["ours"]
