"""What a GPU sends to others in a training step, in bytes, by kind and by what carries it.

`sizes.step` makes seconds of these amounts, and the plan shows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snaketron.sizes.gpus import Gpu
from snaketron.sizes.parameters import expert_width, mamba_widths
from snaketron.sizes.stages import pipeline_stages, trained_parameters
from snaketron.sizes.work import Work

NVLINK, NETWORK = 0.62, 0.8  # shares of the peaks: 282 GB/s were measured between two H100s


@dataclass(frozen=True)
class Moved:
    """Bytes that a GPU sends."""

    nvlink: float = 0.0
    network: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.nvlink + other.nvlink, self.network + other.network)

    def __mul__(self, times: float) -> Moved:
        return Moved(self.nvlink * times, self.network * times)

    @property
    def total(self) -> float:
        """Bytes over both."""
        return self.nvlink + self.network

    def seconds(self, gpu: Gpu) -> float:
        """How long they take, one after the other, at the shares of the peaks that were measured."""
        return self.nvlink / (gpu.nvlink * NVLINK) + self.network / (gpu.network * NETWORK)


NOTHING = Moved()


def traffic(work: Work, gpu: Gpu) -> dict[str, Moved]:
    """What the GPU that sends most sends in a step, by kind. Experts are taken to be loaded evenly."""
    stages = list(_stages(work, gpu))
    kinds = max(stages, key=lambda kinds: sum(moved.total for moved in kinds.values()))
    kinds["pipeline"] = _between_stages(work, gpu)
    of_step = {kind: moved * work.micro_batches for kind, moved in kinds.items()}
    return of_step | {"sums": max(sums_of_stages(work, gpu), key=lambda moved: moved.total)}


def _stages(work: Work, gpu: Gpu) -> Iterator[dict[str, Moved]]:
    """What a GPU of each stage sends for a micro-batch."""
    model = work.model
    stages = pipeline_stages(model, work.vocab_size, work.run.parallel)
    stages[-1] += model.mtp_hybrid_layer_pattern * model.mtp_num_layers
    for number, layers in enumerate(stages, 1):
        kinds = dict.fromkeys(("experts", "tensor", "context"), NOTHING)
        for layer in layers:
            kinds["experts"] += exchange(work, gpu, layer)
            kinds["tensor"] += tensor(work, gpu, layer)
            kinds["context"] += context(work, gpu, layer)
        if number == len(stages):
            kinds["tensor"] += output_sums(work, gpu)
        yield kinds


# ------------------------------------------------------------------------------ of a layer and micro-batch


def exchange(work: Work, gpu: Gpu, layer: str) -> Moved:
    """Copies of tokens on their way to experts and back."""
    if layer != "E":
        return NOTHING
    tokens = work.tokens_of_process / work.run.parallel.tensor_model_parallel_size
    return _to_experts(work, gpu) * (2 * _passes(work, layer) * tokens)


def _to_experts(work: Work, gpu: Gpu) -> Moved:
    """The copies of one token, in one direction, or the mean of both.

    What is gathered goes in bf16, with the weights of each GPU's experts; what comes back is added in fp32.
    """
    model, group = work.model, work.run.parallel.expert_model_parallel_size
    copies = model.moe_router_topk
    if work.dispatcher == "allgather":
        return _within(gpu, group) * (3.0 * expert_width(model) * group + 2.0 * model.num_moe_experts)
    of_copy = 2.0 * expert_width(model)  # bytes
    if work.dispatcher == "alltoall" or group <= gpu.domain:
        return _within(gpu, group) * (copies * of_copy)
    domains = group / gpu.domain
    others = (domains - 1) * (1 - (1 - 1 / domains) ** copies)
    return Moved(nvlink=copies * of_copy, network=others * of_copy)


def tensor(work: Work, gpu: Gpu, layer: str) -> Moved:
    """A gathering and a scattered sum forwards, and one more gathering backwards."""
    group = work.run.parallel.tensor_model_parallel_size
    amount = 2.5 * _passes(work, layer) * work.tokens_of_process * work.model.hidden_size * 2
    return _within(gpu, group) * amount


def context(work: Work, gpu: Gpu, layer: str) -> Moved:
    """Parts of the sequence against parts of the heads; keys and values that go round."""
    model, parallel = work.model, work.run.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1:
        return NOTHING
    amount = 0.0
    if layer == "M":
        inner, conv = mamba_widths(model)
        amount = 2 * (2 * inner + conv)
    elif layer == "*":
        amount = 2 * 2 * model.num_query_groups * model.kv_channels * (cp - 1)
    return _within(gpu, tp * cp) * (work.tokens_of_process / tp * amount * _passes(work, layer))


def output_sums(work: Work, gpu: Gpu) -> Moved:
    """Tensor parallelism of the output layer, once more for each depth of multi-token prediction."""
    group = work.run.parallel.tensor_model_parallel_size
    hidden = work.tokens_of_process * work.model.hidden_size * 2
    return _within(gpu, group) * (3 * (1 + work.model.mtp_num_layers) * hidden)


def _between_stages(work: Work, gpu: Gpu) -> Moved:
    """Hidden states to the next stage of the pipeline, and their gradients to the one before."""
    parallel = work.run.parallel
    stages = parallel.pipeline_model_parallel_size
    hidden = work.tokens_of_process / parallel.tensor_model_parallel_size * work.model.hidden_size * 2
    amount = min(2, stages - 1) * hidden
    # The processes of a stage have numbers one after the other.
    return Moved(nvlink=amount) if parallel.world_size <= gpu.domain else Moved(network=amount)


def _passes(work: Work, layer: str) -> float:
    """Forward and backward pass of exchanges; recomputation adds a forward pass."""
    again = "layer" in work.run.recompute or (layer == "E" and "moe" in work.run.recompute)
    return 3.0 if again else 2.0


def _within(gpu: Gpu, group: int) -> Moved:
    """The shares of what a process exchanges with its group that go over NVLink and over the network."""
    near = min(group, gpu.domain)
    return Moved(nvlink=(near - 1) / group, network=1 - near / group)


# ------------------------------------------------------------------------------------------- the update


def sums_of_stages(work: Work, gpu: Gpu) -> list[Moved]:
    """What a GPU of each stage sends for the update: gradients that are summed, weights that are gathered."""
    parallel = work.run.parallel
    copies = parallel.data_parallel_size * parallel.context_parallel_size
    of_expert = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    processes = parallel.world_size // parallel.pipeline_model_parallel_size
    near = _ring(gpu, copies, parallel.tensor_model_parallel_size)
    among = _ring(gpu, processes // of_expert, of_expert)
    width = (2 if work.optimizer.gradient_precision == "bf16" else 4) + 2  # bytes of a gradient and a weight
    return [
        near * (width * stage.dense_of_process(parallel))
        + among * (width * stage.expert_of_process(parallel))
        for stage in trained_parameters(work.model, work.vocab_size, parallel, work.adapters)
    ]


def _ring(gpu: Gpu, copies: int, between: int) -> Moved:
    """What a process sends for each byte that `copies` processes, `between` ranks apart, sum in a ring."""
    share = (copies - 1) / copies
    return Moved(nvlink=share) if copies * between <= gpu.domain else Moved(network=share)
