"""A training step on several processes: each computes every n-th chunk of the batch, and what they found is summed.

    Every process holds the whole batch, which is a pure function of seed and step, and learns from the same loss; only forward
    and backward passes are shared out. So nothing is scaled by the number of processes, and what comes out is what one process
    makes, up to the order of summation.

The processes are started by `run` on one machine, or by torchrun. Where a weight is replicated its gradients are summed after the
step; `shard` cuts the layers' weights into pieces instead (FSDP2, `torch.distributed.fsdp.fully_shard`), gathered layer by layer.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ullme.attention import decoder_layers, trunk
from ullme.errors import StageFailed, UllmeError

__all__ = ["Processes", "Turn", "clip", "current", "is_sharded", "joined", "put", "run", "shard", "wanted", "whole"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
LOOK_S = 0.1
BUCKET = 2**24
"""Numbers whose gradients are summed in one message."""


class Turn(NamedTuple):
    """A chunk (positions) of this process. counts False: its result is thrown away; it keeps step with processes that have more."""

    chunk: list[int]
    counts: bool


@dataclass(frozen=True)
class Processes:
    """Those that train together, and which of them this is."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """True for the one that writes files."""
        return self.rank == 0

    def budget(self, lengths: Sequence[int], most: int) -> int:
        """Tokens per chunk: at most `most`, fewer where some processes would go without a chunk."""
        return max(1, min(most, -(-sum(lengths) // self.count)))

    def turns(self, chunks: Iterable[list[int]]) -> list[Turn]:
        """This process's share of the chunks; as many turns for every process, because sharded weights are gathered together."""
        everything = list(chunks)
        if not everything:
            return []
        mine = [Turn(chunk, counts=True) for chunk in everything[self.rank :: self.count]]
        rounds = -(-len(everything) // self.count)
        return [*mine, *[Turn(everything[-1][-1:], counts=False)] * (rounds - len(mine))]

    def add(self, *tensors: Tensor) -> None:
        """Sum each tensor over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of replicated weights; those of sharded ones are summed by FSDP."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if not is_sharded(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if bucket and (bucket[0].dtype != parameter.grad.dtype or sum(map(torch.numel, bucket)) >= BUCKET):
                    self._add_together(bucket)
                    bucket = []
                bucket.append(parameter.grad)
        if bucket:
            self._add_together(bucket)

    def _add_together(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(piece.view_as(tensor))

    def agreed(self, make: Callable[[], Result]) -> Result:
        """What `make` returns in the process that leads; the others do not call it, but wait."""
        if self.count == 1:
            return make()
        found: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(found)
        return found[0]

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The block runs in the process that leads, then in the others."""
        if self.count > 1 and not self.leads:
            dist.barrier()
        yield
        if self.count > 1 and self.leads:
            dist.barrier()


def current() -> Processes:
    """The processes that this one trains with; itself alone, where nobody started more."""
    return Processes(dist.get_rank(), dist.get_world_size()) if joined() else Processes()


def joined() -> bool:
    """Whether this process has been started as one of several, and has found the others."""
    if dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched():
        from torch.distributed.distributed_c10d import get_node_local_rank

        _choose_device(get_node_local_rank(0))
        _meet()  # where the others are, torchrun has left in the environment
    return dist.is_available() and dist.is_initialized()


def wanted(processes: Literal["auto"] | int) -> int:
    """How many processes: as configured, or one per GPU."""
    return max(1, torch.cuda.device_count()) if processes == "auto" else processes


# Sharded weights


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The weight or state in full; every process must ask for it."""
    found: Any = tensor.detach()
    return found.full_tensor() if is_sharded(found) else found


def put(target: Tensor, full: Tensor) -> Tensor:
    """`full` in the form that `target` has: in full, or this process's piece of it."""
    if not is_sharded(target):
        return full.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    like: Any = target
    return distribute_tensor(full.to(like.to_local().device), like.device_mesh, like.placements)


def shard(model: nn.Module) -> None:
    """Cut the weights of the decoder layers into pieces, one per process (FSDP2). Adapters, embeddings and head stay whole.

    Gradients of what is trained are summed over the processes, not averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner: Any = trunk(model)
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (current().count,))
    layers = list(decoder_layers(model))
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    adapted = any("lora_" in name for name, _ in model.named_parameters())
    kept = {p for name, p in model.named_parameters() if id(p) not in inside or "lora_" in name}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(inner, mesh=mesh, ignored_params=kept)
    if not adapted:
        for part in [*layers, inner]:
            set_factor = getattr(part, "set_gradient_divide_factor", None) or part.set_reduce_scatter_divide_factor
            set_factor(1.0)
            if hasattr(part, "set_force_sum_reduction_for_comms"):
                part.set_force_sum_reduction_for_comms(True)  # or else it asks for an operation that gloo does not have


def clip(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scale gradients so that their norm is at most `most`; returns the norm before."""
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        return float(nn.utils.clip_grad_norm_(parameters, most))
    pieces: list[Any] = [parameter.grad for parameter in sharded if parameter.grad is not None]
    squares = torch.stack([piece.to_local().double().square().sum() for piece in pieces]).sum()
    dist.all_reduce(squares)
    rest = [
        parameter.grad.double().square().sum()
        for parameter in parameters
        if not is_sharded(parameter) and parameter.grad is not None
    ]
    norm = torch.stack([squares, *rest]).sum().sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            (gradient.to_local() if is_sharded(gradient) else gradient).mul_(factor)
    return float(norm)


# Starting


def run(count: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of a module in `count` processes that know each other; returns what the first of them returned.

    Arguments and result are plain values: tensors would lie in memory that ends with the process.

    Raises:
        What the function raises in any of them; the others are ended. StageFailed: one of them crashed.
    """
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    said = torch.multiprocessing.get_context("spawn").SimpleQueue()
    found: list[_Said] = []

    def listen() -> None:
        while not said.empty():
            one = said.get()
            if isinstance(one, _Said):
                found.append(one)
            else:
                logger.log(one[0], "%s", one[1])

    with tempfile.TemporaryDirectory(prefix="ullme-processes-") as folder:
        work = start_processes(_work, (count, folder, said, function, arguments), nprocs=count, join=False, start_method="spawn")
        assert work is not None  # join=False
        try:
            while not work.join(timeout=LOOK_S):
                listen()
        except (ProcessExitedException, ProcessRaisedException) as error:
            listen()
            errors = [one.value for one in found if one.failed]
            own = [value for value in errors if isinstance(value, UllmeError)]  # the others' connections broke because of it
            if own or errors:
                raise (own or errors)[0] from None
            raise StageFailed("train", getattr(error, "exit_code", 1), [str(error)]) from None
        listen()
    return next(one.value for one in found if not one.failed)


class _Said(NamedTuple):
    """How a process ended: with an error, or with the result, which only the first one tells."""

    failed: bool
    value: Any


class _Told(logging.Handler):
    """Log records as (level, text) for the process that waits."""

    def __init__(self, said: Any) -> None:
        super().__init__()
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Tell it."""
        self._said.put((record.levelno, self.format(record)))


def _work(rank: int, count: int, folder: str, said: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Told(said)], force=True)
    if rank == 0:
        logging.getLogger("ullme").setLevel(logging.INFO)
    else:
        logging.disable(logging.ERROR)  # they would say the same once more
    try:
        _choose_device(rank)
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        _meet(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
        result = function(*arguments)
        if rank == 0:
            said.put(_Said(failed=False, value=result))
    except Exception as error:
        said.put(_Said(failed=True, value=error))
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(**where: Any) -> None:
    """Find the others; nobody goes on, and perhaps ends, while another one still connects."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **where)
    dist.barrier()


def _choose_device(rank: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
