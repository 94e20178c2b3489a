"""The layers of each pipeline stage, and the parameters of a stage."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from snaketron.config import Adapters, Model, Parallel
from snaketron.config.linears import Linear, linears, targeted
from snaketron.sizes.compute import (
    LAYER_ON_HOST,
    layer_seconds,
    output_seconds,
    overlapped,
    stays_in_bf16,
)
from snaketron.sizes.gpus import GPUS
from snaketron.sizes.parameters import Parameters, mtp_parameters, of_layers, padded_vocab_size

# Where stages take equally long, with as many tokens in a micro-batch. A model has the same stages on every
# GPU and for every length of sequences.
GPU, LENGTH = GPUS["h100"], 8192


def pipeline_stages(model: Model, vocab_size: int, parallel: Parallel) -> list[str]:
    """The layers of each pipeline stage, as patterns.

    By `pipeline_split` they take equally long, as far as whole layers allow, on a GPU and its host: the
    slowest one is as fast as can be, and the others are as much alike as can be then. Or they have equally
    many layers, the first ones one more. The last stage also has the output layer, the loss and multi-token
    prediction.

    >>> model = Model(hybrid_layer_pattern="MEM*EME", mtp_num_layers=1, mtp_hybrid_layer_pattern="*E")
    >>> two = Parallel(pipeline_model_parallel_size=2)
    >>> pipeline_stages(model, 131072, two)
    ['MEM*E', 'ME']
    >>> pipeline_stages(model, 131072, two.model_copy(update={"pipeline_split": "layers"}))
    ['MEM*', 'EME']

    Raises:
        ValueError: fewer layers than stages.
    """
    pattern, stages = model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size
    if stages > len(pattern):
        raise ValueError(
            f"model.hybrid_layer_pattern {pattern!r} has {len(pattern)} layers, "
            f"too few for pipeline_model_parallel_size {stages}"
        )
    if stages == 1 or parallel.pipeline_split == "layers":
        ends = even_ends(len(pattern), stages)
    else:
        on_gpu, on_host = layer_costs(model, vocab_size), host_costs(model)
        ends = balanced_ends(tuple(zip(on_gpu, on_host, strict=True)), stages)
    return [pattern[start:end] for start, end in itertools.pairwise([0, *ends])]


def layer_costs(model: Model, vocab_size: int) -> list[int]:
    """A GPU's time of each layer for a token in 10^-15 s, that of the last one with all that follows it.

    Whole numbers, so that stages of the same layers take the same time in whatever order it is added.
    """
    kinds = [(layer, stays_in_bf16(model, number)) for number, layer in enumerate(model.hybrid_layer_pattern)]
    seconds = {
        (layer, in_bf16): layer_seconds(model, layer, LENGTH, GPU, in_bf16=in_bf16)
        for layer, in_bf16 in {*kinds, *((layer, True) for layer in model.mtp_hybrid_layer_pattern)}
    }
    block = sum(seconds[layer, True] for layer in model.mtp_hybrid_layer_pattern)
    rows = padded_vocab_size(model, vocab_size, 1)
    after = output_seconds(model, rows, GPU) + model.mtp_num_layers * block
    costs = [round(seconds[kind] * 1e15) for kind in kinds]
    return [*costs[:-1], costs[-1] + round(after * 1e15)]


def host_costs(model: Model) -> list[int]:
    """What `layer_costs` is, of a host that starts kernels one by one: each layer takes it as long.

    The output layer and the loss have few kernels. So the stage that has them waits least for its host.
    """
    each, last = round(LAYER_ON_HOST / LENGTH * 1e15), len(model.hybrid_layer_pattern) - 1
    return [each] * last + [each * (1 + model.mtp_num_layers * len(model.mtp_hybrid_layer_pattern))]


def even_ends(layers: int, stages: int) -> tuple[int, ...]:
    """How many layers there are up to the end of each stage, if these have equally many.

    >>> even_ends(7, 3)
    (3, 5, 7)
    """
    size, extra = divmod(layers, stages)
    return tuple(stage * size + min(stage, extra) for stage in range(1, stages + 1))


@functools.lru_cache(maxsize=64)
def balanced_ends(costs: tuple[tuple[int, int], ...], stages: int) -> tuple[int, ...]:
    """How many layers there are up to the end of each stage, if the slowest one is as fast as can be.

    `costs` are those of each layer on a GPU and on its host.

    >>> balanced_ends(((20, 0), (20, 0), (20, 0), (20, 0), (80, 0)), 2)
    (4, 5)
    >>> balanced_ends(((20, 0), (20, 0), (20, 0), (20, 0), (60, 0)), 2)  # the first stage keeps more memory
    (3, 5)
    >>> balanced_ends(((20, 30), (20, 30), (20, 30), (20, 30), (80, 30)), 2)
    (3, 5)
    """
    slowest, _, _ = _best(costs, stages, 0)
    _, _, ends = _best(costs, stages, slowest)
    return ends


def _best(costs: tuple[tuple[int, int], ...], stages: int, allowed: int) -> tuple[int, int, tuple[int, ...]]:
    """The best cuts: the time of the slowest stage, the sum of the stages' times squared, the stages' ends.

    Where no stage takes longer than `allowed`, those are the best whose stages are most alike.
    """
    on_gpu, on_host = ([0, *itertools.accumulate(of_layers)] for of_layers in zip(*costs, strict=True))
    best = {0: (allowed, 0, tuple[int, ...]())}  # by the end of the stages so far
    for later in reversed(range(stages)):  # each later stage has a layer at least
        last = len(costs) - later
        best = {
            end: min(
                (max(slowest, took), squares + took**2, (*ends, end))
                for start, (slowest, squares, ends) in best.items()
                if start < end
                for took in [round(overlapped(on_gpu[end] - on_gpu[start], on_host[end] - on_host[start]))]
            )
            for end in range(stages - later if later else last, last + 1)
        }
    return best[len(costs)]


@functools.lru_cache(maxsize=64)  # a search asks for those of a layout up to 45 times, one after the other
def stage_parameters(model: Model, vocab_size: int, parallel: Parallel) -> tuple[Parameters, ...]:
    """Parameters of each pipeline stage.

    The first one holds the embedding. The last one holds the final norm, the output layer and
    multi-token prediction, which needs the embedding too: with several stages it holds a copy.
    """
    stages = pipeline_stages(model, vocab_size, parallel)
    found = [of_layers(model, stage) for stage in stages]
    table = Parameters(
        padded_vocab_size(model, vocab_size, parallel.tensor_model_parallel_size) * model.hidden_size
    )
    found[0] += table
    found[-1] += table + Parameters(replicated=model.hidden_size) + mtp_parameters(model)
    if model.mtp_num_layers and len(stages) > 1:
        found[-1] += table
    return tuple(found)


def adapter_parameters(
    model: Model, vocab_size: int, parallel: Parallel, adapters: Adapters
) -> list[Parameters]:
    """Parameters of the adapters of each pipeline stage: A (rank, inputs) and B (outputs, rank) of a layer.

    Tensor parallelism divides A or B: the one with the axis that is divided in the layer itself.
    """
    stages = pipeline_stages(model, vocab_size, parallel)
    of_layer = {
        letter: _adapters(linears(model, letter, with_mtp=False), adapters, parallel)
        for letter in set(model.hybrid_layer_pattern)
    }
    found = [_sum(of_layer[letter] * count for letter, count in Counter(stage).items()) for stage in stages]
    found[-1] += _adapters(linears(model, "", with_mtp=True), adapters, parallel)
    return found


def trained_parameters(
    model: Model, vocab_size: int, parallel: Parallel, adapters: Adapters | None
) -> Sequence[Parameters]:
    """Trained parameters of each pipeline stage: those of adapters alone where there are some."""
    if adapters:
        return adapter_parameters(model, vocab_size, parallel, adapters)
    return stage_parameters(model, vocab_size, parallel)


def _adapters(there: list[Linear], adapters: Adapters, parallel: Parallel) -> Parameters:
    return _sum(_adapter(linear, adapters, parallel) for linear in targeted(adapters.target_modules, there))


def _adapter(linear: Linear, adapters: Adapters, parallel: Parallel) -> Parameters:
    if linear.experts:
        rank = adapters.expert_rank or adapters.rank
        whole = linear.inputs if linear.parallel == "column" else linear.outputs
        divided = linear.inputs + linear.outputs - whole
        # Each process of expert tensor parallelism holds the whole of the other matrix.
        return Parameters(
            expert=linear.experts * rank * (divided + whole * parallel.expert_tensor_parallel_size)
        )
    a, b = adapters.rank * linear.inputs, adapters.rank * linear.outputs
    if linear.parallel == "replicated":
        return Parameters(replicated=a + b)
    return Parameters(b, a) if linear.parallel == "column" else Parameters(a, b)


def _sum(parameters: Iterable[Parameters]) -> Parameters:
    return sum(parameters, Parameters())
