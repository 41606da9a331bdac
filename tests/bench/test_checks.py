"""The comparisons before the timing see a wrong forward pass, a wrong backward pass, a wrong loss; the limits count what is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mwm.bench.bench_layers import needed_products
from mwm.bench.bench_step import StepSides
from mwm.bench.encoders import DENSE, MASKED, EncoderSides, waken
from mwm.bench.layer_list import LAYERS, Layer
from mwm.bench.rows import read_csv
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sides() -> EncoderSides:
    return EncoderSides("resnet18", 0.5, batch=2, size=64)


@pytest.mark.parametrize("rival", [DENSE, MASKED])
@pytest.mark.parametrize("fault", ["none", "forward", "backward"])
def test_encoder_checks_see_a_fault_in_one_inner_layer(sides: EncoderSides, rival: str, fault: str) -> None:
    inner = sides.ours.get_submodule("layer2.1.conv2")
    if fault == "forward":
        with torch.no_grad():
            inner.weight[:, :, 0, 0] = 0  # one tap dropped
    if fault == "backward":
        inner.weight.register_hook(lambda grad: 1.5 * grad)
    check = sides.check(rival)
    assert check.passed == (fault == "none"), check


def test_step_check_sees_another_token_and_another_decoder_gradient() -> None:
    sides = StepSides("resnet18", width=32, batch=2, size=64)
    plain = dict(ours_bf16=False, authors_bf16=False)
    assert sides.check(**plain).passed
    hook = sides.ours.decoder.blocks[0][1].weight.register_hook(lambda grad: 1.5 * grad)
    assert not sides.check(**plain).passed
    hook.remove()
    with torch.no_grad():
        sides.ours.densify["8"].mask_token += 0.1
    assert not sides.check(**plain).passed


def test_scales_that_start_at_zero_are_woken_and_no_others() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    nn.init.zeros_(net[1].weight)
    waken(net)
    assert torch.equal(net[0].weight, torch.ones(3)) and torch.equal(net[1].weight, torch.full((3,), 0.1)) and not net[1].bias.any()


def test_needed_products_count_visible_pairs_only() -> None:
    layer = Layer("x", "3x3 t2", 1, 1, 3, 2)
    one = torch.zeros(1, 3, 3, dtype=torch.bool)
    one[0, 1, 1] = True
    assert needed_products(one, layer) == 16  # each of the four positions sees all four
    beside = one.clone()
    beside[0, 1, 2] = True
    assert needed_products(beside, layer) == 32 + 2 * 4  # two rows of two pairs each across the border, both ways
    whole = torch.ones(1, 3, 3, dtype=torch.bool)
    assert needed_products(whole, layer) == (3 * 6 - 2) ** 2
    assert needed_products(one, Layer("x", "1x1/2 t2", 1, 1, 1, 2, 2)) == 1


def test_the_layers_of_both_nets_are_listed() -> None:
    nets = {"resnet50": set(), "convnext_tiny": set()}
    for layer in LAYERS:
        if layer.net in nets:
            nets[layer.net].add((layer.kind, layer.kernel, layer.edge if layer.kernel in (3, 7) else 0))
    assert {("conv", 3, edge) for edge in (8, 4, 2, 1)} | {("max-pool", 3, 16), ("batch norm", 1, 0), ("conv", 1, 0)} <= nets["resnet50"]
    assert {("conv", 7, edge) for edge in (8, 4, 2, 1)} | {("layer norm", 1, 0)} <= nets["convnext_tiny"]


def test_the_suite_runs_under_pytest_benchmark(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", str(ROOT / "bench"), "--smoke", "-q", "-k", "coverage or sampler", "--csv", str(tmp_path / "rows.csv"),
                           "--benchmark-json", str(tmp_path / "bench.json"), "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {row.bench for row in read_csv(tmp_path / "rows.csv")} == {"sampler", "coverage"}
    assert "authors' loop" in (tmp_path / "bench.json").read_text()
