"""Several processes that train one model: one for each GPU, or for each machine without one.

Plain `torch.distributed`, started by `torchrun`. Each process computes its part of every batch;
gradients and the statistics of batch norms are those of the whole batch, so that a run is the same
for any number of processes up to the order of sums. Without `torchrun` everything here is the
identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed
from torch.distributed.nn import functional

from atsnn.errors import ConfigError

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another; the first one evaluates while the others wait."""


def processes() -> int:
    """Processes that train together."""
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Number of this process, from 0; the first one writes files and speaks."""
    return distributed.get_rank() if processes() > 1 else 0


def drawn_for_all(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of what one process would draw for the batch of all of them.

    Args:
        draw: makes so many random rows; the generators of all processes stand alike. rows: of
            this process.
    """
    first = rank() * rows
    return draw(processes() * rows)[first : first + rows]


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of `values` over all processes, without a gradient."""
    if processes() > 1:
        values = values.detach().clone()
        distributed.all_reduce(values)
    return values


def differentiable_sum(values: Tensor) -> Tensor:
    """Sum of `values` over all processes; its gradient is summed over them as well."""
    return functional.all_reduce(values) if processes() > 1 else values  # pyright: ignore[reportReturnType] untyped in torch


def mean_of_all(mean: Tensor) -> Tensor:
    """Mean over processes of their means; the gradient goes to this process's own.

    With gradients averaged over processes, a loss of it has the gradient of the whole batch.
    """
    whole = sum_over_processes(mean.detach()) / processes()
    return mean + (whole - mean.detach()) if processes() > 1 else mean


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over the processes, in one message."""
    count = processes()
    if count == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    distributed.all_reduce(flat)
    flat /= count
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's values."""
    if processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), 0)


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if processes() > 1:
        distributed.barrier()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine; another device as it is."""
    if device.type == "cuda" and processes() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; alone without it, or if joined already.

    Raises:
        ConfigError: more processes than GPUs on this machine.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not started or distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if index >= count:
            raise ConfigError(
                f"process {index + 1} on a machine with {count} GPUs: start torchrun with "
                f"--nproc-per-node {count}, or set train.device to cpu"
            )
        torch.cuda.set_device(index)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()
