"""The state of megatron-core's distributed optimizer in a checkpoint, which any layout can read.

It is, for each parameter of the model, its main weight and Adam's moments, in fp32 and in the parameter's
shape. megatron-core 0.19.2 has this format (`fully_reshardable`), but collects the state of a whole replica
in the host memory of each process, and in a buffer of several buckets takes values from where they would be
without the padding between buckets. Here each parameter is written by one of the processes that hold a part
of it, which is sent the rest, and read by each of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from snaketron.model.megatron.host_memory import HostMemory
from snaketron.model.megatron.originals import original
from snaketron.model.megatron.stored import Stored, Wanted

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

STATE_DICT = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict"
LOAD_STATE_DICT = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict"


class Place(NamedTuple):
    """A parameter in its bucket of gradients, of which each rank holds `length` numbers."""

    parameter: Tensor
    start: int
    end: int
    length: int

    @property
    def holders(self) -> range:
        """The ranks that hold a part of the parameter."""
        return range(self.start // self.length, (self.end - 1) // self.length + 1)

    def part(self, rank: int) -> slice:
        """The slice of the flattened parameter that a rank holds."""
        begin, end = rank * self.length, (rank + 1) * self.length
        return slice(max(begin - self.start, 0), min(end, self.end) - self.start)


@contextlib.contextmanager
def _groups_alone(optimizer: Any) -> Iterator[None]:
    """Have a torch optimizer give and take its groups, while the state of its parameters stays as it is."""
    state = optimizer.state
    optimizer.state = {"": {}}  # of no parameter; an empty one would be allocated
    try:
        yield
    finally:
        optimizer.state = state


def state_dict(self: DistributedOptimizer) -> dict[str, Any]:
    """What is not the state of a parameter: the groups."""
    if isinstance(self.optimizer, HybridDeviceOptimizer):
        return original(STATE_DICT)(self)
    with _groups_alone(self.optimizer):
        return original(STATE_DICT)(self)


def load_state_dict(self: DistributedOptimizer, state_dict: dict[str, Any]) -> None:
    """Take what `state_dict` gave, and the state of the parameters if it is there (`param_state`)."""
    if isinstance(self.optimizer, HybridDeviceOptimizer):
        original(LOAD_STATE_DICT)(self, state_dict)
        return
    adam = self.optimizer
    for parameter in (p for group in adam.param_groups for p in group["params"]):
        if not adam.state[parameter]:
            remainders = getattr(adam, "store_param_remainders", False)
            adam.initialize_state(parameter, remainders and parameter.dtype == torch.bfloat16)
    with _groups_alone(adam):
        original(LOAD_STATE_DICT)(self, {k: v for k, v in state_dict.items() if k != "param_state"})
    if "param_state" in state_dict:
        load(self, state_dict["param_state"])


def _buckets(optimizer: DistributedOptimizer) -> list[list[Place]]:
    """Parameters of each bucket, in the same order on all ranks of the data parallel group."""
    size = optimizer.data_parallel_group.size()
    return [
        [
            Place(parameter, start, end, bucket.grad_data.numel() // size)
            for parameter, (start, end) in bucket.param_to_index.items()
        ]
        for buffer in optimizer.buffers
        for bucket in buffer.buckets
    ]


def _owners(buckets: list[list[Place]]) -> dict[Tensor, int]:
    """The rank that writes each parameter: of those that hold a part of it, the one with least to write."""
    load: Counter[int] = Counter()
    owners = {}
    places = [place for bucket in buckets for place in bucket]
    for place in sorted(places, key=lambda p: (len(p.holders) > 1, p.start - p.end)):
        owners[place.parameter] = owner = min(place.holders, key=lambda rank: load[rank])
        load[owner] += place.end - place.start
    return owners


def _keys(optimizer: DistributedOptimizer) -> list[str]:
    return ["param", *optimizer.optimizer_state_keys]


def saved_bytes(optimizer: MegatronOptimizer) -> int:
    """About the bytes of a checkpoint that this rank writes: fp32 state, and its share of the weights."""
    parts = [p for p in optimizer.chained_optimizers if not getattr(p, "is_stub_optimizer", False)]
    return sum(
        sum(place.end - place.start for place in bucket)
        // part.data_parallel_group.size()
        * (4 * len(_keys(part)) + bucket[0].parameter.element_size())
        for part in parts
        for bucket in _buckets(part)
    )


class Asked(NamedTuple):
    """What is read of a checkpoint when megatron-core has read the rest."""

    stored: Stored
    tensors: list[tuple[Place, dict[str, Any]]]


def shards(
    self: DistributedOptimizer,
    model_sharded_state_dict: Any,
    is_loading: bool = False,
    metadata: Any = None,
) -> dict[Any, Any]:
    """What this rank writes, by the number of the parameter in the buffers, or what it will read.

    `metadata` has the checkpoint that is read (`stored`), or the host memory for what is written (`memory`).
    """
    rank, group = self.data_parallel_group.rank(), self.data_parallel_group
    tensors = extract_sharded_tensors_and_factories(model_sharded_state_dict)[0]
    described = {shard.data: shard for shard in nested_values(tensors)}
    buckets = _buckets(self)
    if is_loading:
        asked = [
            (place, {key: _as(described[place.parameter], f"optimizer.state.{key}.") for key in _keys(self)})
            for place in itertools.chain(*buckets)
            if rank in place.holders
        ]
        # In an object, which megatron-core does not look into.
        return {"": LocalNonpersistentObject(Asked(metadata["stored"], asked))}
    owners = _owners(buckets)
    # An owner takes the place of the first rank, which megatron-core has for the main replica.
    replicas = [described[place.parameter].replica_id for bucket in buckets for place in bucket]
    if replicas:  # a pipeline stage without experts has none in the optimizer of experts
        torch.distributed.broadcast_object_list(replicas, group_src=0, group=group)
    shards: dict[Any, dict[str, Any]] = {}
    number = 0
    for bucket in buckets:
        values = _whole(self, bucket, owners, metadata["memory"])
        for place in bucket:
            parameter = place.parameter
            if parameter in values:
                shards[number] = {
                    key: _as(described[parameter], f"optimizer.state.{key}.", value, replicas[number])
                    for key, value in zip(_keys(self), values[parameter], strict=True)
                }
            number += 1
    metadata["memory"].wait()
    # An empty dictionary would count as a value, and not all ranks have it.
    return shards or {"": LocalNonpersistentObject(None)}


def _as(shard: Any, prefix: str, value: Tensor | None = None, replica: Any = None) -> Any:
    """The description of a parameter, for one of its numbers in the optimizer; without a value to read it."""
    if value is not None:
        value = value.view(shard.data.shape)
    elif not isinstance(shard, ShardedTensor):  # the parts that a factory makes are described by what it has
        value = torch.empty(shard.data.shape)
    dtype = {"dtype": torch.float32} if isinstance(shard, ShardedTensor) else {}
    replica = shard.replica_id if replica is None else replica
    return replace(shard, key=prefix + shard.key, data=value, replica_id=replica, **dtype)


def _whole(
    optimizer: DistributedOptimizer, bucket: list[Place], owners: dict[Tensor, int], memory: HostMemory
) -> dict[Tensor, list[Tensor]]:
    """The state of the parameters of a bucket that this rank owns, flattened, one tensor a key.

    A collective operation of the data parallel group. Whatever is a copy is in host memory, where it is when
    `memory.wait()` has returned.
    """
    group, keys = optimizer.data_parallel_group, _keys(optimizer)
    rank, ranks = group.rank(), range(group.size())
    held: dict[Tensor, list[Held]] = {}
    for place in bucket:
        if rank in place.holders:
            held[place.parameter] = [_held(optimizer, place.parameter, key) for key in keys]
    whole = {
        p.parameter: [_written(one, memory) for one in held[p.parameter]]
        for p in bucket
        if list(p.holders) == [rank]
    }
    # Parts of the others go to their owners.
    shared = [place for place in bucket if len(place.holders) > 1]
    mine = [p for p in shared if owners[p.parameter] == rank]
    whole |= {place.parameter: [] for place in mine}
    device = bucket[0].parameter.device  # where the model computes, wherever the state is kept
    for key in range(len(keys)) if shared else ():
        sent = [[p for p in shared if owners[p.parameter] == to and rank in p.holders] for to in ranks]
        parts = [held[p.parameter][key].whole().to(device) for places in sent for p in places]
        sizes = [[_size(p.part(source)) for p in mine if source in p.holders] for source in ranks]
        received = torch.empty(sum(map(sum, sizes)), device=device)
        torch.distributed.all_to_all_single(
            received,
            torch.cat([*parts, received[:0]]),
            [sum(of_source) for of_source in sizes],
            [sum(_size(p.part(rank)) for p in places) for places in sent],
            group,
        )
        pieces = iter(received.split([size for of_source in sizes for size in of_source]))
        found: dict[Tensor, list[Tensor]] = {place.parameter: [] for place in mine}
        for source in ranks:
            for place in mine:
                if source in place.holders:
                    found[place.parameter].append(next(pieces))
        for place in mine:
            joint = torch.cat(found[place.parameter])
            whole[place.parameter].append(memory.copy(functools.partial(_part, joint), len(joint)))
    return whole


def _part(values: Tensor, begin: int, end: int) -> Tensor:
    return values[begin:end]


class Held(NamedTuple):
    """One of the numbers that this rank holds of a parameter, flattened: a main weight or a moment.

    With a bf16 `weight` the values are the 16 bits after it.
    """

    values: Tensor
    weight: Tensor | None

    @property
    def size(self) -> int:
        """How many numbers this rank holds."""
        return self.values.numel()

    def fp32(self, begin: int, end: int) -> Tensor:
        """Some of the numbers in fp32, where the state is kept."""
        if self.weight is None:
            return self.values[begin:end].float()
        return joined(self.weight[begin:end], self.values[begin:end])

    def as_it_is(self) -> Tensor | None:
        """The numbers without a copy: None where they are in another precision.

        Nor where a GPU shares their memory, which a process that writes in the background would see change.
        """
        as_it_is = self.values.dtype == torch.float32 and not self.values.is_pinned()
        return self.values if as_it_is else None

    def whole(self) -> Tensor:
        """All of them in fp32, (size,)."""
        return self.fp32(0, self.size)

    def take(self, begin: int, values: Tensor) -> None:
        """Take fp32 numbers from number `begin` on; the weight too, where the main weight is kept as that."""
        part = slice(begin, begin + len(values))
        if self.weight is None:
            self.values[part].copy_(values)
        else:
            weight, remainder = split(values)
            self.weight[part].copy_(weight)
            self.values[part].copy_(remainder)


def _written(held: Held, memory: HostMemory) -> Tensor:
    """The numbers in fp32 for a checkpoint, copied only where they must be."""
    as_it_is = held.as_it_is()
    return memory.copy(held.fp32, held.size) if as_it_is is None else as_it_is


def _held(optimizer: DistributedOptimizer, parameter: Tensor, key: str) -> Held:
    """What this rank holds of a parameter: its main weight (`param`) or one of the optimizer's moments."""
    group, order = optimizer.model_param_group_index_map[parameter]
    weight = optimizer.optimizer.param_groups[group]["params"][order]
    state, flat = optimizer.optimizer.state[weight], weight.detach().view(-1)
    if key != "param":
        return Held(state[key].view(-1), None)
    # Transformer Engine's AdamW copies an fp32 weight to `master_param`, too, and never updates that copy.
    apart = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    if not apart or weight.dtype == torch.float32:
        return Held(flat, None)
    main = state["master_param"].view(-1)
    return Held(main, flat if main.dtype == torch.int16 else None)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 number whose upper half is a bf16 `weight`, and whose lower half is an int16 `remainder`.

    The weight is rounded: where the remainder is negative as an int16, its last bit counts one too many. So
    Transformer Engine's AdamW keeps main weights with moments in bf16 (`store_param_remainders`).
    """
    high, low = weight.contiguous().view(torch.int16).int(), remainder.int()
    return (((high - (low < 0).int()) << 16) | (low & 0xFFFF)).view(torch.float32)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the remainder of fp32 numbers: what `joined` joins."""
    bits = value.float().contiguous().view(torch.int32)
    low = bits.to(torch.int16)  # the lower half
    high = (bits >> 16) + (low < 0).int()
    return high.to(torch.int16).view(torch.bfloat16), low


def _size(part: slice) -> int:
    return part.stop - part.start


@torch.no_grad()
def load(self: DistributedOptimizer, state_dict: dict[str, Asked]) -> None:
    """Read this rank's part of each parameter that `shards` asked for."""
    rank, asked = self.data_parallel_group.rank(), state_dict[""]
    on_host = isinstance(self.optimizer, HybridDeviceOptimizer)  # it moves what belongs on the GPU
    wanted = []
    for place, shards in asked.tensors:
        for key, shard in shards.items():
            part = place.part(rank)
            if on_host:
                _renew(self, place.parameter, key, _size(part))
            wanted.append(Wanted(shard, part, _held(self, place.parameter, key).take))
    device = torch.device("cpu") if on_host or not wanted else asked.tensors[0][0].parameter.device
    asked.stored.read(wanted, device)
    if on_host:
        self.optimizer._sync_hdo_state_to_sub_optimizers()


def _renew(optimizer: DistributedOptimizer, parameter: Tensor, key: str, size: int) -> None:
    """Give a part of the state of an offloaded optimizer new memory on the host."""
    tensors = {key: torch.empty(size)}
    optimizer._set_main_param_and_optimizer_states(parameter, tensors)
