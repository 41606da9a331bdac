"""Several processes, as torchrun starts them: who is who, batch norm over all of them, gradients summed in rank order.

Every sum over ranks gathers the parts and adds them in the order of the ranks, so that a run repeats itself to the bit at the
same world size. All ranks must call these functions in the same order.
"""

from __future__ import annotations

import inspect
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mwm.train.synced_norm import synchronised

# torch 2.14 renamed both and warns about the old names, which older versions have alone.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFERS = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this process computes.
        owns_group: whether `stop` ends the process group.
    """

    rank: int
    size: int
    device: torch.device
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def start(device: str = "auto", backend: str | None = None) -> World:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: "cpu", "cuda", "cuda:1", or "auto": CUDA where there is one. Under torchrun, "cuda" means the GPU of LOCAL_RANK.
        backend: "gloo" or "nccl"; None takes nccl on CUDA, gloo elsewhere.

    Returns:
        This process's world. Without torchrun's variables its size is 1 and no process group exists.

    Raises:
        ValueError: the device is unknown or not there, torchrun's variables are incomplete, or there are more local processes than GPUs.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), _local_device(kind, dist.get_world_size()))
    if size == 1:
        return World(0, 1, _local_device(kind, 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"distributed: WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start the processes with torchrun.")
    local = _local_device(kind, size)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group(backend or ("nccl" if local.type == "cuda" else "gloo"))
    return World(dist.get_rank(), dist.get_world_size(), local, owns_group=True)


def pick_device(name: str, op: str = "distributed") -> torch.device:
    """The device that a setting names; "auto" is CUDA where there is one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".
        op: who asks, for the message.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{op}: device must be auto, cpu, cuda or cuda:N, got {name!r}.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{op}: device must be present, got {name!r} on a machine without CUDA. Use cpu.")
    return device


def _local_device(kind: str, size: int) -> torch.device:
    device = pick_device(kind)
    if size == 1 or kind != "cuda":
        return device
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"distributed: process {number} of this machine has no GPU, there are {torch.cuda.device_count()}. Start fewer processes "
            f"(--nproc-per-node) or set device to cpu."
        )
    return torch.device("cuda", number)


def stop(world: World) -> None:
    """Leave the process group that `start` made."""
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()


def sync_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Let every batch norm inside take its statistics over all ranks, in place.

    Works on plain tensors and on packed tiles, on CPU and GPU, with counts that differ by rank and with ranks that have nothing
    visible. Keys, buffers, evaluation mode and `isinstance` stay as they are.

    Args:
        module: the module, sparsified before.
        world: the processes; with one of them nothing changes.

    Returns:
        The same module.
    """
    if world.size > 1:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                synchronised(layer)
    return module


def wrap(module: nn.Module, world: World) -> nn.Module:
    """DistributedDataParallel whose gradients are the mean over ranks, added in the order of the ranks.

    Args:
        module: the module on its device; its parameters are made equal to those of rank 0.
        world: the processes; with one of them the module itself is returned.

    Returns:
        A module with the same forward.
    """
    if world.size == 1:
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    # Running statistics are equal on all ranks already, see sync_batch_norm.
    wrapped = DistributedDataParallel(module, device_ids=devices, **_NO_BUFFERS)
    wrapped.register_comm_hook(world, _mean_in_rank_order)
    # Strides of axes of length 1 mean nothing, but torch compares them; said once per process, in three lines.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides", category=UserWarning)
    return wrapped


def _mean_in_rank_order(world, bucket):
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(sum_over_ranks(bucket.buffer(), world).div_(world.size))
    return done


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """Sum of a tensor over all ranks, the same bits on each.

    Every rank receives one share of the elements from all, adds them in the order of the ranks, and hands its sums to all:
    the traffic of a usual all-reduce, with a fixed order.

    Args:
        tensor: same shape and dtype on every rank; takes no gradient.
        world: the processes.

    Returns:
        A new tensor of the same shape.
    """
    tensor = tensor.detach()
    if world.size == 1:
        return tensor.clone()
    flat = tensor.reshape(-1)
    share = -(-flat.numel() // world.size)
    padded = flat.new_zeros(share * world.size)
    padded[: flat.numel()] = flat
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)
    total = parts[:share].clone()
    for rank in range(1, world.size):
        total += parts[rank * share : (rank + 1) * share]
    _ALL_GATHER(parts, total)
    return parts[: flat.numel()].reshape(tensor.shape)


def global_hidden_scale(hidden: Tensor, world: World) -> Tensor:
    """What a rank's summed loss is multiplied with, so that the mean of the ranks' gradients is that of the joint batch.

    loss = (sum over local hidden patches) * world / (all-reduced number of hidden patches); the mean of rank means would not be
    the joint mean.

    Args:
        hidden: number of local hidden patches that count. []
        world: the processes.

    Returns:
        world.size / max(1, number of hidden patches of all ranks). float64 []
    """
    return world.size / sum_over_ranks(hidden.double(), world).clamp(min=1)


def broadcast_object(value: Any, world: World) -> Any:
    """Rank 0's value on every rank; plain Python values of processes that trust each other."""
    if world.size == 1:
        return value
    box = [value if world.is_main else None]
    dist.broadcast_object_list(box, src=0, device=world.device if world.device.type == "cuda" else None)
    return box[0]


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier()
