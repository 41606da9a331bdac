"""Steps that are replayed as graphs give the run that steps from Python give; the bookkeeping is tried on the CPU, with a recorder that calls what it recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mwm
from mwm.train import PretrainConfig, captured, pretrain
from mwm.train.config import TrainError
from mwm.train.logs import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # protobuf and tensorboard
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Replaying:
    """As a CUDA graph: recording runs nothing, replaying runs the same work on the same tensors and leaves the result at the same place."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def beside(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        result = torch.full((6,), torch.nan, dtype=torch.float64)

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return result, replay


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    """Stands in for CUDA."""
    made = Replaying()
    monkeypatch.setattr(captured, "check", lambda device, processes: None)
    monkeypatch.setattr(captured, "CudaRecorder", lambda device: made)
    return made


@pytest.fixture
def short(settings: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """A run of 24 steps under a name."""

    def run(name: str, **changes: Any) -> Path:
        return pretrain(PretrainConfig(**{**settings, "drop_path": 0.0, "epochs": 6, "panel_every": 0, "out": str(tmp_path / name), **changes}))

    return run


@pytest.mark.parametrize(("masks", "graphs"), [
    ({"high": 0.8, "mask_ratio": 0.55}, [1]),  # a fixed count
    ({"high": 0.8, "low": 0.4}, range(2, 12)),  # the count follows the regions
    ({"mask": "matched", "high": 0.8, "low": 0.4, "region_weight": 2.0, "min_std": 0.05}, range(2, 12)),
], ids=["fixed", "varying", "weighted"])
def test_replayed_steps_give_the_bits_of_steps_from_python(short: Callable[..., Path], recorder: Replaying, masks: dict[str, Any], graphs: list[int]) -> None:
    plain, replayed = short("plain", **masks), short("replayed", cuda_graph=True, **masks)
    assert (plain / "metrics.csv").read_bytes() == (replayed / "metrics.csv").read_bytes()
    ours, theirs = (load_file(run / "encoder.safetensors") for run in (replayed, plain))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert recorder.recorded in graphs and recorder.replayed > recorder.recorded >= 1


def test_a_run_goes_on_with_graphs_from_a_checkpoint_without(short: Callable[..., Path], recorder: Replaying, monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.train import loop

    step, left = loop._Trainer._step, [10]

    class Cut(Exception):
        pass

    def cut(self: Any, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Cut
        return step(self, *arguments)

    plain = short("plain", mask_ratio=0.5)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(loop._Trainer, "_step", cut)
        short("cut", mask_ratio=0.5)
    again = pretrain(PretrainConfig.from_run(plain.parent / "cut", cuda_graph=True))
    assert recorder.replayed > 5
    assert (plain / "metrics.csv").read_bytes() == (again / "metrics.csv").read_bytes()


def test_only_so_many_graphs_are_kept_and_the_rest_runs_without(short: Callable[..., Path], recorder: Replaying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "LIMIT", 1)
    masks = {"high": 0.8, "low": 0.4}
    plain, replayed = short("plain", **masks), short("replayed", cuda_graph=True, **masks)
    assert recorder.recorded == 1
    assert (plain / "metrics.csv").read_bytes() == (replayed / "metrics.csv").read_bytes()


def test_what_cannot_be_captured_ends_in_one_sentence(short: Callable[..., Path], recorder: Replaying) -> None:
    def refuse(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")

    recorder.record = refuse
    with pytest.raises(TrainError, match=r"cannot be captured \(operation not permitted when stream is capturing\)\. Run again without it\.$"):
        short("run", mask_ratio=0.5, cuda_graph=True)


def test_hidden_decoding_needs_masks_of_a_fixed_count(short: Callable[..., Path], recorder: Replaying) -> None:
    with pytest.raises(TrainError, match="cuda_graph with decode hidden must have masks of a fixed count"):
        short("run", high=0.8, low=0.4, decode="hidden", cuda_graph=True)
    short("fixed", high=0.8, mask_ratio=0.55, decode="hidden", cuda_graph=True, epochs=2)
    assert recorder.recorded == 1 and recorder.replayed == 5


def test_graphs_are_refused_where_there_are_none(short: Callable[..., Path], config: PretrainConfig) -> None:
    with pytest.raises(TrainError, match="cuda_graph must be false on cpu"):
        short("run", mask_ratio=0.5, cuda_graph=True)
    with pytest.raises(TrainError, match="cuda_graph must be false with several processes, got true with 4"):
        captured.check(torch.device("cuda"), 4)
    with pytest.raises(TrainError, match="cuda_graph must be left out with drop path"):
        config.replace(cuda_graph=True)
    with pytest.raises(TrainError, match="cuda_graph must be true or false, got 'yes'"):
        config.replace(cuda_graph="yes")


def test_a_plan_may_stand_for_its_mask() -> None:
    torch.manual_seed(0)
    import timm

    net = mwm.sparsify(timm.create_model("test_resnet", features_only=True, in_chans=1))
    images, active = torch.randn(3, 1, 64, 96), torch.rand(3, 2, 3) < 0.5
    plan = mwm.ops.build_plan(active, 32)
    for decode in ("dense", "hidden"):
        model = mwm.MaskedImageModel(net, patch_size=32, decoder_width=32, decode=decode).eval()
        assert torch.equal(model(images, active), model(images, plan))
    with pytest.raises(ValueError, match="plan of patches of 32 pixels, the images' edge over the grid's, got one of 16"):
        mwm.pack(images, mwm.ops.build_plan(active, 16))


@pytest.mark.parametrize("masks", [{"high": 0.8, "mask_ratio": 0.55}, {"high": 0.8, "low": 0.4}, {"high": 0.8, "mask_ratio": 0.55, "decode": "hidden"}],
                         ids=["fixed", "varying", "hidden"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cache", [None, "device"])
class TestOnAGpu:
    pytestmark = gpu

    def test_replayed_steps_follow_steps_from_python(self, short: Callable[..., Path], masks: dict[str, Any], precision: str, cache: str | None) -> None:
        told = {**masks, "precision": precision, "cache": cache, "device": "cuda", "crop_scale": (1.0, 1.0)}
        losses = [read_metrics(short(name, cuda_graph=name == "replayed", **told) / "metrics.csv")["loss"] for name in ("plain", "replayed")]
        assert losses[0] == pytest.approx(losses[1], rel=5e-2 if precision == "bf16" else 5e-3)


def test_drop_path_is_never_frozen_into_a_graph() -> None:
    """The guard, without a GPU: what asks for noise while a stream is captured is told why it gets none."""
    from mwm.sparse import randomness

    class OnCuda:
        is_cuda = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with mwm.sparse.random_state(seed=0, ids=[1, 2], epoch=0), pytest.raises(RuntimeError, match="repeat one draw"):
            randomness.keep_noise(2, 1, 0.1, 3, OnCuda())
