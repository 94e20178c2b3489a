"""Trainings whose speed and memory were measured, here or by others, as the estimates take them."""

from __future__ import annotations

from typing import Any, NamedTuple

from snaketron.config import Model, Optimizer, Run
from snaketron.config.base import Dispatcher
from snaketron.sizes.work import Work

HERE = "docs/measurements.md"
CARD = "Megatron Bridge's verification card"
TABLE = "Megatron Bridge's performance table"

# The models of tests/benchmarks/gpu_training.py: one of 2.12 billion parameters, and slices of Nemotron 3.
BENCHMARK = Model(
    mtp_num_layers=2,
    mtp_hybrid_layer_pattern="*E",
    hybrid_layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEME",
    hidden_size=2048,
    num_attention_heads=16,
    num_query_groups=2,
    kv_channels=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_moe_experts=64,
    moe_router_topk=6,
    moe_ffn_hidden_size=1344,
    moe_latent_size=512,
    moe_shared_expert_intermediate_size=2688,
    precision="bf16",
)
NANO_SLICE = Model(
    hybrid_layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    mtp_num_layers=0,
    mtp_hybrid_layer_pattern="*E",
    init_method_std=0.02,
    hidden_size=2688,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_moe_experts=16,
    moe_router_topk=6,
    moe_ffn_hidden_size=1856,
    moe_latent_size=None,
    moe_shared_expert_intermediate_size=3712,
    precision="bf16",
)
VOCABULARY = 131072
FP8: dict[str, Any] = {"precision": "fp8_current"}
SHORT = Optimizer(gradient_precision="bf16", moment_precision="bf16")


class Point(NamedTuple):
    """A measured training; what was not measured is None."""

    what: str
    gpu: str
    work: Work
    tokens_per_second: float | None  # of each GPU
    peak_gib: float | None  # in tensors, of the fullest GPU; where layers are recorded, reserved
    source: str


def points(super_model: Model) -> list[Point]:
    """All points; `super_model` is that of config/super.yaml."""
    piece = {"hybrid_layer_pattern": "MEMEMEM*EME", "mtp_num_layers": 1, "num_moe_experts": 64}
    super_slice = super_model.model_copy(update=piece)
    quarter = super_model.model_copy(
        update={"hybrid_layer_pattern": "MEMEMEM*EMEMEMEM*EMEME", "mtp_num_layers": 1}
    )
    here = [*_of_one_gpu(), *_of_two_gpus(), *_of_slices(super_slice), *_of_four_gpus(quarter)]
    return here + _of_others(super_model)


def _work(
    model: Model,
    length: int,
    batch: int,
    micro_batch: int,
    optimizer: Optimizer | None = None,
    *,
    precision: str = "bf16",
    graphs: bool = False,
    recorded: bool = False,
    dispatcher: Dispatcher = "alltoall",
    run: dict[str, Any] | None = None,
    keeps_scan: bool = False,
    pipeline_split: str = "layers",
    **parallel: int,
) -> Work:
    """Its peak, where measured, is that of a scan that computes again, unless `keeps_scan`."""
    sizes: dict[str, Any] = {f"{name}_parallel_size": size for name, size in parallel.items()}
    sizes["pipeline_split"] = pipeline_split
    return Work(
        model=model.model_copy(update={"precision": precision}),
        vocab_size=VOCABULARY,
        seq_length=length,
        global_batch_size=batch,
        run=Run.model_validate({"micro_batch_size": micro_batch, "parallel": sizes} | (run or {})),
        optimizer=optimizer or Optimizer(),
        cuda_graphs=graphs,
        recorded=recorded,
        dispatcher=dispatcher,
        keeps_scan=keeps_scan,
    )


def _of_one_gpu() -> list[Point]:
    def of(batch: int, micro_batch: int, **more: Any) -> Work:
        return _work(BENCHMARK, 4096, batch, micro_batch, **more)

    short: dict[str, Any] = {"optimizer": SHORT}
    fp8 = FP8
    # Where the GPU was the limit, today's code is faster than the one whose speed was measured.
    rows: list[tuple[str, str, Work, float | None, float | None]] = [
        ("micro-batch 1", "h200", of(1, 1), 19_121, 44.4),
        ("micro-batch 1, CUDA graphs", "h200", of(1, 1, graphs=True), 26_230, 46.9),
        ("micro-batch 4", "h200", of(4, 4), None, 68.2),
        ("micro-batch 4, gradients and moments in bf16", "h200", of(4, 4, **short), None, 52.4),
        ("micro-batch 8", "h200", of(8, 8), None, 100.1),
        ("micro-batch 4, four a step, fp8", "h200", of(16, 4, **fp8), None, 67.7),
        ("micro-batch 4", "h100", of(4, 4), None, 68.2),
        ("recompute [moe]", "h100", of(4, 4, run={"recompute": ["moe"]}), None, 61.3),
        ("recompute [layer]", "h100", of(4, 4, run={"recompute": ["layer"]}), None, 50.6),
        ("offload_optimizer 0.5", "h100", of(4, 4, run={"offload_optimizer": 0.5}), None, 58.3),
    ]
    return [Point(f"2.12 B: {what}", gpu, work, speed, peak, HERE) for what, gpu, work, speed, peak in rows]


def _of_two_gpus() -> list[Point]:
    def of(batch: int, **parallel: Any) -> Work:
        return _work(BENCHMARK, 4096, batch, 4, **parallel)

    rows: list[tuple[str, Work, float]] = [
        ("DP 2", of(8, data=2), 56.4),
        ("EP 2", of(8, data=2, expert_model=2), 53.8),
        ("TP 2", of(4, tensor_model=2), 37.6),
        ("CP 2", of(4, context=2), 40.5),
        ("PP 2", of(16, pipeline_model=2), 47.7),
    ]
    return [Point(f"2.12 B: {what}", "h100", work, None, peak, HERE) for what, work, peak in rows]


def _of_slices(super_slice: Model) -> list[Point]:
    def of(model: Model, length: int, batch: int, micro_batch: int = 1, **more: Any) -> Work:
        return _work(model, length, batch, micro_batch, SHORT, **more)

    nano, fp8 = NANO_SLICE, FP8
    recorded: dict[str, Any] = {"recorded": True, "keeps_scan": True}
    two: dict[str, Any] = {"keeps_scan": True, "data": 2}
    wider = super_slice.model_copy(update={"num_moe_experts": 128})
    rows: list[tuple[str, Work, float, float | None]] = [
        ("slice of Super, 8K", of(super_slice, 8192, 2, **recorded), 32_879, 59.1),
        ("slice of Super, 4K", of(super_slice, 4096, 4, **recorded), 32_089, 49.2),
        ("slice of Super, 8K, fp8", of(super_slice, 8192, 2, **recorded, **fp8), 37_395, 64.2),
        ("slice of Nano, 8K", of(nano, 8192, 4, **recorded), 24_176, 86.5),
        ("slice of Nano, 4K", of(nano, 4096, 8, **recorded), 24_214, 71.6),
        ("slice of Nano, 8K, fp8", of(nano, 8192, 4, **recorded, **fp8), 29_533, 94.2),
        ("slice of Super, DP 2", of(super_slice, 8192, 4, **two), 30_212, 47.4),
        ("slice of Super, EP 2", of(wider, 8192, 4, expert_model=2, **two), 27_733, 54.2),
        ("slice of Super, TP 2", of(super_slice, 8192, 2, tensor_model=2, keeps_scan=True), 24_276, 34.0),
    ]
    return [Point(what, "h200", work, speed, peak, HERE) for what, work, speed, peak in rows]


def _of_four_gpus(quarter: Model) -> list[Point]:
    """With evenly loaded experts where the speed is given: an uneven load has a speed of its own."""

    def of(model: Model, batch: int, **more: Any) -> Work:
        return _work(model, 8192, batch, 1, SHORT, **{"keeps_scan": True} | more)

    four: dict[str, Any] = {"expert_model": 4, "data": 4}
    two: dict[str, Any] = {"expert_model": 2, "data": 2}
    few = NANO_SLICE.model_copy(update={"num_moe_experts": 32})
    nano, whole = (NANO_SLICE.model_copy(update={"num_moe_experts": count}) for count in (64, 128))
    few_layers = quarter.model_copy(update={"hybrid_layer_pattern": "MEMEM*EME"})
    pipeline: dict[str, Any] = two | {"pipeline_model": 2}
    again: dict[str, Any] = {"run": {"recompute": ["scan"]}, "keeps_scan": False}
    equal: dict[str, Any] = pipeline | again | {"pipeline_split": "time", "dispatcher": "allgather"}
    tp4: dict[str, Any] = {"tensor_model": 4, "expert_model": 4}
    fp8 = four | again | FP8
    rows: list[tuple[str, Work, float | None, float | None]] = [
        ("Nano's layers, 64 experts, EP 4", of(nano, 16, **four), 17_215, 77.5),
        ("Nano's layers, 64 experts, EP 4, CUDA graphs", of(nano, 16, graphs=True, **four), 18_881, 90.2),
        ("Nano's layers, 32 experts, EP 2, CUDA graphs", of(few, 8, graphs=True, **two), 19_084, 94.9),
        ("Nano, EP 4", of(whole, 16, **four), 15_909, 112.4),
        ("Nano, EP 4, CUDA graphs", of(whole, 16, graphs=True, **four), 18_523, 121.9),
        ("Nano, EP 4, fp8, the scan again", of(whole, 16, **fp8), 16_589, 123.4),
        (
            "9 layers of Super, 512 experts, EP 2, CUDA graphs",
            of(few_layers, 16, graphs=True, dispatcher="allgather", **two),
            33_304,
            None,
        ),
        ("a quarter of Super, TP 4, EP 4", of(quarter, 8, **tp4), None, 88.9),
        (
            "a quarter of Super, TP 4, EP 4, CUDA graphs",
            of(quarter, 8, graphs=True, dispatcher="allgather", **tp4),
            10_393,
            None,
        ),
        ("a quarter of Super, PP 2, EP 2", of(quarter, 16, **pipeline), None, 113.1),
        ("a quarter of Super, PP 2, EP 2, stages of equal time", of(quarter, 32, **equal), 16_224, 123.6),
    ]
    return [Point(what, "h200", work, speed, peak, HERE) for what, work, speed, peak in rows]


def _of_others(super_model: Model) -> list[Point]:
    """Published ones, whose experts exchange tokens by HybridEP where they are on several nodes."""
    again = {"recompute": ["layernorm", "moe", "core_attn"]}
    h100: dict[str, Any] = {"pipeline_model": 2, "expert_model": 32, "data": 32, "run": again}
    nano = NANO_SLICE.model_copy(update={"num_moe_experts": 128})
    spread: dict[str, Any] = {"dispatcher": "hybridep"}
    fp8 = FP8
    fp4: dict[str, Any] = {"precision": "nvfp4"}

    def of(length: int, batch: int, **more: Any) -> Work:
        return _work(super_model, length, batch, 1, SHORT, **more)

    return [
        Point("Super on 64 H100, 8K", "h100", of(8192, 1280, **h100, **spread), 2_969, None, TABLE),
        Point("Super on 64 H100, 4K, real text", "h100", of(4096, 1280, **h100, **spread), 2_789, 58.1, CARD),
        Point(
            "Nano on 16 H100, fp8",
            "h100",
            _work(nano, 8192, 1024, 1, SHORT, expert_model=8, data=16, **fp8),
            14_719,
            None,
            TABLE,
        ),
        Point(
            "Super on 64 B200, fp8",
            "b200",
            of(8192, 1280, expert_model=64, data=64, **fp8, **spread),
            6_400,
            None,
            TABLE,
        ),
        Point(
            "Super on 64 GB200, fp8",
            "gb200",
            of(8192, 512, tensor_model=2, expert_model=64, data=32, graphs=True, **fp8, **spread),
            7_040,
            None,
            TABLE,
        ),
        Point(
            "Super on 64 GB300, nvfp4",
            "gb300",
            of(8192, 512, expert_model=64, data=64, graphs=True, **fp4, **spread),
            10_240,
            None,
            TABLE,
        ),
    ]
