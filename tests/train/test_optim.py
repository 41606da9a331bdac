"""Schedules and parameter groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from mwm.train.config import PretrainConfig
from mwm.train.optim import Schedule, create_optimizer, parameter_groups


class _Model(nn.Module):
    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def _config(**changes) -> PretrainConfig:
    return PretrainConfig(**{"images": "scans", "out": "run", "epochs": 10, "warmup_epochs": 2, **changes})


def test_learning_rate_warms_up_then_falls_along_a_cosine() -> None:
    schedule = Schedule.of(_config(base_lr=1e-3, min_lr=1e-5), steps_per_epoch=5, batch_size=128)
    rates = [schedule.lr(step) for step in range(schedule.steps)]
    assert rates[0] == pytest.approx(5e-4 / 10)
    assert rates[9] == rates[10] == pytest.approx(5e-4)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert schedule.lr(30) == pytest.approx((5e-4 + 5e-6) / 2)
    assert schedule.lr(50) == pytest.approx(5e-6)


def test_weight_decay_rises_along_a_cosine() -> None:
    schedule = Schedule.of(_config(), steps_per_epoch=5, batch_size=128)
    assert [schedule.weight_decay(step) for step in (0, 25, 50)] == pytest.approx([0.04, 0.12, 0.2])


def test_biases_norms_and_tokens_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = _Model()
    decays, stays = parameter_groups(model)
    assert [p.shape for p in decays["params"]] == [model.net[0].weight.shape]
    assert len(stays["params"]) == 4


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_only_the_decaying_group_gets_weight_decay(name: str) -> None:
    model = _Model()
    optimizer = create_optimizer(model, _config(optimizer=name))
    Schedule.of(_config(), 5, 128).apply(optimizer, 50)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.0])
    model.net(torch.randn(2, 1, 8, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(("batch_norm", "beta"), [(True, 0.95), (False, 0.999)])
def test_second_beta_follows_the_encoders_norm(batch_norm: bool, beta: float) -> None:
    assert create_optimizer(_Model(batch_norm), _config()).param_groups[0]["betas"] == (0.9, beta)


def test_layer_scale_does_not_decay_whoever_wrote_the_net() -> None:
    """timm gives it one axis, torchvision three."""
    import torchvision

    from mwm.train.optim import parameter_groups

    net = torchvision.models.convnext_tiny()
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decays, stays = ({names[id(p)] for p in group["params"]} for group in parameter_groups(net))
    assert "features.1.0.layer_scale" in stays and "features.1.0.block.0.weight" in decays
    assert all(name.endswith(".weight") for name in decays)
