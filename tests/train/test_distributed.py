from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mwm.train import distributed
from mwm.train.distributed import World

WORKER = Path(__file__).resolve().parent / "distributed_worker.py"
ALONE = World(0, 1, torch.device("cpu"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(modes: str, size: int, folder: Path, tag: str = "a") -> list[dict[str, Tensor]]:
    """What each rank found."""
    out = folder / f"{tag}{size}"
    port = str(_free_port())
    processes = []
    for rank in range(size):
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **world, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "error::FutureWarning", str(WORKER), modes, str(out)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )
    logs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return [torch.load(f"{out}.rank{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Tensor]]]:
    """All modes at world sizes 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("distributed")
    modes = "norm,norm32,sums,train,train blind,train hidden,train32,resume32"
    return {size: _run(modes if size == 1 else f"{modes},few", size, folder) for size in (1, 2, 3)}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("mode", "tolerance"), [("norm", 1e-12), ("norm32", 1e-5)])
def test_norm_over_ranks_with_different_counts_is_the_norm_of_the_joint_batch(runs: dict, size: int, mode: str, tolerance: float) -> None:
    """Counts 5 and 3, and 5, 0 and 3."""
    joint, ranks = runs[1][0], runs[size]
    for name in ("out", "grad", "evaluated"):
        found = torch.cat([rank[f"{mode}/{name}"] for rank in ranks])
        torch.testing.assert_close(found, joint[f"{mode}/{name}"], rtol=tolerance, atol=tolerance)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        for rank in ranks:
            torch.testing.assert_close(rank[f"{mode}/{name}"], joint[f"{mode}/{name}"], rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("size", [2, 3])
def test_one_position_in_all_has_variance_zero_and_none_changes_nothing(runs: dict, size: int) -> None:
    for rank, found in enumerate(runs[size]):
        assert torch.equal(found["few/one out"], torch.zeros(int(rank == 1), 3, 1, 1))
        assert torch.equal(found["few/one grad"], torch.zeros(int(rank == 1), 3, 1, 1))
        torch.testing.assert_close(found["few/one mean"], torch.full((3,), 0.5))
        assert torch.equal(found["few/one var"], torch.ones(3))
        assert found["few/none out"].shape == (0, 3, 1, 1)
        assert torch.equal(found["few/none mean"], torch.zeros(3))
        assert torch.equal(found["few/none var"], torch.ones(3))


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_taken_in_rank_order_and_equal_on_every_rank(runs: dict, size: int) -> None:
    ranks = runs[size]
    names = [name for name in ranks[0] if name.startswith("sums/sum")]
    assert names
    for name in names:
        expected = ranks[0][name.replace("/sum", "/part")].clone()
        for rank in ranks[1:]:
            expected += rank[name.replace("/sum", "/part")]
        assert all(torch.equal(rank[name], expected) for rank in ranks)
    assert all(rank["sums/scalar"] == size * (size + 1) / 2 for rank in ranks)
    assert all(rank["sums/word"] == 0 for rank in ranks)


@pytest.mark.parametrize("mode", ["train", "train blind", "train hidden"])
@pytest.mark.parametrize("size", [2, 3])
def test_five_steps_on_several_processes_equal_one_on_the_joint_batch(runs: dict, size: int, mode: str) -> None:
    """float64, different numbers of visible and hidden patches by rank; in "train blind" one rank sees nothing at all."""
    joint = {name: value for name, value in runs[1][0].items() if name.startswith(f"{mode}/")}
    assert len(joint) > 20
    for rank in runs[size]:
        for name, value in joint.items():
            torch.testing.assert_close(rank[name], value, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_resumed_run_is_bit_equal_at_the_same_world_size(runs: dict, size: int) -> None:
    for rank in runs[size]:
        straight = {name.split("/")[1]: value for name, value in rank.items() if name.startswith("train32/")}
        resumed = {name.split("/")[1]: value for name, value in rank.items() if name.startswith("resume32/")}
        assert straight.keys() == resumed.keys()
        assert [name for name in straight if not torch.equal(straight[name], resumed[name])] == []


def test_two_runs_of_two_processes_are_bit_equal(runs: dict, tmp_path: Path) -> None:
    again = _run("train32", 2, tmp_path, "again")
    for first, second in zip(runs[2], again, strict=True):
        assert [name for name, value in second.items() if not torch.equal(value, first[name])] == []


def test_ranks_hold_equal_weights_after_training(runs: dict) -> None:
    first, *others = runs[3]
    for rank in others:
        assert [name for name, value in first.items() if name.startswith("train") and not torch.equal(value, rank[name])] == []


def test_one_process_changes_nothing() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    assert distributed.sync_batch_norm(module, ALONE) is module
    assert type(module[1]) is nn.BatchNorm2d
    assert distributed.wrap(module, ALONE) is module
    assert distributed.sum_over_ranks(torch.tensor(2.0), ALONE) == 2
    assert distributed.global_hidden_scale(torch.tensor(4.0), ALONE) == 0.25
    assert distributed.broadcast_object("x", ALONE) == "x"


def test_a_synchronised_layer_can_be_copied_and_keeps_its_keys() -> None:
    layer = nn.BatchNorm2d(3)
    keys = set(layer.state_dict())
    distributed.sync_batch_norm(layer, World(0, 2, torch.device("cpu")))
    again = distributed.sync_batch_norm(layer, World(0, 2, torch.device("cpu")))
    assert again is layer
    other = copy.deepcopy(layer)
    assert type(other) is type(layer)
    assert isinstance(other, nn.BatchNorm2d)
    assert set(other.state_dict()) == keys
    assert other.weight is not layer.weight
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), nn.BatchNorm2d(3).eval()(x))


def test_incomplete_torchrun_variables_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        distributed.start("cpu")
