"""The training loop resumes to the same weights, keeps the best epoch, stops in time, and says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mwm.train import TrainError
from mwm.transfer import FinetuneConfig, TransferError
from mwm.transfer.fit import Fitted, autocast, fit, pick_device, rate

CPU = torch.device("cpu")
STEPS = 4


class Killed(Exception):
    """Stands for a kill."""


def config(**changes) -> FinetuneConfig:
    return FinetuneConfig(**({"run": "r", "data": "d", "progress": False, "epochs": 6, "lr": 0.05, "weight_decay": 0.01} | changes))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        x = torch.randn(16, 3, generator=generator)
        yield x, x.sum(1, keepdim=True)


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def judge(model: nn.Module) -> dict[str, float]:
    x, y = next(batches(1000))
    return {"val_loss": float(nn.functional.mse_loss(model(x), y))}


def run(model: nn.Module, settings: FinetuneConfig, *, batches_of=batches, judge_of=judge, **more) -> Fitted:
    return fit(model, batches_of, loss_of, judge_of, groups=[{"params": list(model.parameters()), "lr": settings.lr, "weight_decay": settings.weight_decay}],
               config=settings, per_epoch=STEPS, device=CPU, **more)


@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_a_killed_fit_reaches_the_weights_of_one_that_was_not(tmp_path: Path, epoch: int) -> None:
    whole = network()
    expected = run(whole, config())

    def dies(at: int) -> Iterator:
        if at == epoch:
            yield next(iter(batches(at)))
            raise Killed
        yield from batches(at)

    state = tmp_path / "state"
    with pytest.raises(Killed):
        run(network(), config(), batches_of=dies, state=state, checkpoint_seconds=0)
    torch.manual_seed(99)  # another process
    parted = network()
    found = run(parted, config(resume=True), state=state, checkpoint_seconds=0)
    assert all(torch.equal(value, parted.state_dict()[key]) for key, value in whole.state_dict().items())
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(found.history) == strip(expected.history)
    assert found.chosen == expected.chosen


def test_an_unwhole_state_and_one_of_other_settings_are_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    run(network(), config(), state=state, checkpoint_seconds=0)
    with pytest.raises(TransferError, match=r"lr must be 0\.05 as when the run began, got 0\.1"):
        run(network(), config(resume=True, lr=0.1), state=state)
    run(network(), config(resume=True, device="cpu", workers=3), state=state)
    with pytest.raises(TransferError, match="training images of the interrupted run, got others"):
        run(network(), config(resume=True), state=state, ids=[3, 1])
    other = network()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-3
    with pytest.raises(TransferError, match="first weights must be those of the interrupted run, got others"):
        run(other, config(resume=True), state=state)
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(TrainError, match="damaged"):
        run(network(), config(resume=True), state=state)


@pytest.mark.parametrize(("better", "values", "best", "ran"), [
    ("val_loss", [3.0, 1.0, 2.0, 1.5, 1.0, 0.5], 2, 4), ("val_score", [0.1, 0.7, 0.3, 0.7, 0.9, 1.0], 2, 4), ("val_loss", [3.0, math.nan, 2.0, 2.0, 1.0, 3.0], 5, 6),
])
def test_the_best_epoch_is_kept_and_patience_ends_a_fit(better: str, values: list[float], best: int, ran: int) -> None:
    model, seen = network(), []

    def judged(net: nn.Module) -> dict[str, float]:
        assert not net.training
        seen.append({key: value.clone() for key, value in net.state_dict().items()})
        return {better: values[len(seen) - 1]}

    fitted = run(model, config(patience=2), judge_of=judged, better=better)
    assert (fitted.chosen["epoch"], fitted.chosen["epochs"], len(fitted.history)) == (best, ran, ran)
    assert fitted.chosen[better] == values[best - 1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in seen[best - 1].items())
    assert not model.training


def test_rates_rise_for_the_warm_up_and_fall_as_a_cosine() -> None:
    assert [rate(step, 100, 10) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 0.5 * (1 + math.cos(0.09 * math.pi))])
    assert rate(50, 100, 10) == pytest.approx(0.5)
    assert rate(99, 100, 0) < 0.001
    model = network()
    fitted = run(model, config(warmup_epochs=1.0))
    assert fitted.history[0]["lr"] == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 3 / 24)))


def test_every_group_keeps_its_own_rate() -> None:
    model = network()
    before = [p.clone() for p in model.parameters()]
    first, *rest = model.parameters()
    settings = config(epochs=1)
    fit(model, batches, loss_of, judge, groups=[{"params": [first], "lr": 0.0, "weight_decay": 0.0}, {"params": rest, "lr": 0.1, "weight_decay": 0.0}], config=settings,
        per_epoch=STEPS, device=CPU)
    assert torch.equal(first, before[0])
    assert not torch.equal(rest[0], before[1])


def test_losses_and_figures_that_are_not_finite_end_in_one_sentence() -> None:
    with pytest.raises(TransferError, match=r"loss must be finite, got nan in epoch 1\. Lower --lr\."):
        run(network(), config(), batches_of=lambda epoch: [(x * math.nan, y) for x, y in batches(epoch)])
    with pytest.raises(TransferError, match="val_loss must be finite, got NaN in every epoch"):
        run(network(), config(epochs=2), judge_of=lambda model: {"val_loss": math.nan})


def test_bf16_computes_layers_in_bf16_and_keeps_weights_in_fp32() -> None:
    seen = set()
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    run(model, config(precision="bf16", epochs=1))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fp16_and_absent_devices_are_refused() -> None:
    with pytest.raises(TransferError, match="precision must be fp32 or bf16 on cpu, got 'fp16'"):
        autocast("fp16", CPU)
    with pytest.raises(TransferError, match="precision must be fp32 or bf16 on cpu"):
        run(network(), config(precision="fp16"))
    with pytest.raises(TransferError, match="device must be auto, cpu, cuda or cuda:N, got 'teapot'"):
        pick_device("teapot")
