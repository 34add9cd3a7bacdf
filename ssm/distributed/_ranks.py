"""What the ranks of a group say to each other: sizes, and tensors from peer to peer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ssm._errors import ArgumentError, bad_argument

Group = dist.ProcessGroup | None
Messages = Mapping[int, Sequence[Tensor]]  # rank -> tensors, in an order both know
Prepared = TypeVar("Prepared")
Agreed = tuple["Shards", Prepared]


@dataclass
class CommCount:
    """Bytes and messages of tensors that this rank sent, backward passes included.

    What the ranks tell each other beforehand (shapes, some hundred bytes whatever the
    length) is not counted.
    """

    bytes: int = 0
    messages: int = 0

    def add(self, tensor: Tensor) -> None:
        """Count one message."""
        self.bytes += tensor.numel() * tensor.element_size()
        self.messages += 1


class Pending(NamedTuple):
    """Messages under way; the tensors sent live as long as this does."""

    works: list[dist.Work]
    sent: list[Tensor]

    def wait(self) -> None:
        """Until all have arrived (on CUDA: in the order of the stream)."""
        for work in self.works:
            work.wait()


class Shards(NamedTuple):
    """How many steps every rank holds, and whether any rank needs gradients."""

    lengths: list[int]
    needs_grad: bool = False

    @property
    def starts(self) -> list[int]:
        """The number of steps before each rank's."""
        return [0, *accumulate(self.lengths)][:-1]

    def anchor(self) -> Tensor:
        """An input that makes what is computed from it differentiable on every rank.

        Backward is a conversation too. A rank whose own tensors need no gradients would
        be missed in it, and what it computes depends on those that do.
        """
        return torch.zeros(0, requires_grad=self.needs_grad)


class Facts(NamedTuple):
    """A rank's number of steps, and by name what must be equal on all ranks."""

    length: int
    alike: dict[str, object]
    needs_grad: bool = False

    def and_alike(self, **more: object) -> "Facts":
        """With more that must be equal."""
        return self._replace(alike={**self.alike, **more})


class Told(NamedTuple):
    """What a rank says of its arguments: what is wrong with them, or the facts."""

    problem: str | None
    facts: Facts | None = None


@dataclass(frozen=True)
class Ranks:
    """A process group as seen from one of its ranks; ranks count within the group."""

    rank: int
    size: int
    group: Group
    count: CommCount

    @classmethod
    def of(cls, group: Group, count: CommCount | None) -> "Ranks":
        """The group (None: all processes, or this one alone where there is no group).

        Raises ArgumentError for a group that this process is not in.
        """
        count = CommCount() if count is None else count
        if not dist.is_initialized():
            return cls(0, 1, None, count)
        group = dist.group.WORLD if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise bad_argument(
                "group",
                "one without this process",
                "one that it belongs to",
                "call it on the ranks of the group",
            )
        return cls(rank, dist.get_world_size(group), group, count)

    def agree(self, prepare: Callable[[], tuple[Facts, Prepared]]) -> Agreed[Prepared]:
        """The shards of all ranks and what ``prepare`` made, if no rank's went wrong.

        Otherwise ArgumentError on every rank: were it raised on one alone, the others
        would wait for it for ever.
        """
        prepared = None
        try:
            facts, prepared = prepare()
            told = self._gather(Told(None, facts))
        except ArgumentError as error:
            told = self._gather(Told(str(error)))
        for rank, (problem, _) in enumerate(told):
            if problem is not None:
                raise ArgumentError(f"rank {rank}: {problem}")
        everyone = [each.facts for each in told if each.facts is not None]
        _check_alike(everyone)
        needed = any(each.needs_grad for each in everyone)
        shards = Shards([each.length for each in everyone], needed)
        return shards, cast("Prepared", prepared)

    def _gather(self, told: Told) -> list[Told]:
        if self.size == 1:
            return [told]
        everyone = [told] * self.size
        dist.all_gather_object(everyone, told, group=self.group)
        return everyone

    def shift(
        self, tensors: Sequence[Tensor], distance: int
    ) -> tuple[Tensor, ...] | None:
        """Give tensors to the rank ``distance`` ahead; get those of the one behind.

        None where there is none: the line has ends. All ranks' have one shape.
        """
        ahead, behind = self.rank + distance, self.rank - distance
        fresh = tuple(fresh_like(x) for x in tensors)
        ranks = range(self.size)
        sends = {ahead: tensors} if ahead in ranks else {}
        receives = {behind: fresh} if behind in ranks else {}
        self.exchange(sends, receives).wait()
        return fresh if receives else None

    def exchange(self, sends: Messages, receives: Messages) -> Pending:
        """Start to send tensors, and to fill those of ``receives`` (contiguous ones).

        Tensors between two ranks are matched by their order; empty ones do not travel.
        """
        kept, operations = [], []
        for peer, tag, tensor in _travelling(sends):
            self.count.add(tensor)
            kept.append(_wire(tensor.contiguous().resolve_conj().resolve_neg()))
            operations.append(self._operation(dist.isend, kept[-1], peer, tag))
        for peer, tag, tensor in _travelling(receives):
            operations.append(self._operation(dist.irecv, _wire(tensor), peer, tag))
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, kept)

    def _operation(
        self,
        operation: Callable[..., dist.Work | None],
        tensor: Tensor,
        peer: int,
        tag: int,
    ) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, tag=tag, group_peer=peer)


def facts_of(length: int | None, **tensors: Tensor) -> Facts:
    """Dtypes, devices and shapes must be alike; not dimension 1, if it is the time.

    length: the number of steps; None where the tensors have no time.
    """
    alike: dict[str, object] = {}
    for name, x in tensors.items():
        steps = () if length is None else ("steps",)
        alike[f"shape of {name}"] = (len(x), *steps, *x.shape[1 + len(steps) :])
        alike[f"dtype of {name}"] = str(x.dtype)
        alike[f"kind of device of {name}"] = x.device.type
    recording = torch.is_grad_enabled()
    alike["whether gradients are recorded"] = recording
    needed = recording and any(x.requires_grad for x in tensors.values())
    return Facts(length or 0, alike, needed)


def fresh_like(x: Tensor) -> Tensor:
    """Room for a tensor of this shape that is about to come; contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def tied(y: Tensor, *others: Tensor) -> Tensor:
    """y; where it is empty, backward still reaches ``others`` (with zeros).

    A rank without steps would else leave the conversation of the backward pass.
    """
    if y.numel() == 0:
        for x in others:
            y = y + 0 * (x.real if x.is_complex() else x).sum().to(y.dtype)
    return y


def _check_alike(everyone: Sequence[Facts]) -> None:
    first = everyone[0].alike
    for rank, facts in enumerate(everyone):
        for name, value in facts.alike.items():
            if name not in first or first[name] != value:
                raise bad_argument(
                    name,
                    f"{first.get(name)} on rank 0 and {value} on rank {rank}",
                    "the same on every rank",
                    "make them alike",
                )


def _travelling(messages: Messages) -> Iterable[tuple[int, int, Tensor]]:
    for peer, tensors in messages.items():
        for tag, tensor in enumerate(tensors):
            if tensor.numel():
                yield peer, tag, tensor


def _wire(tensor: Tensor) -> Tensor:
    """The same numbers as real ones: NCCL has no complex dtypes."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
