"""Whether the installed megatron-core still needs each row of the table of replacements.

A test runs the original piece and shows its fault. One that fails after an upgrade says that its row can go.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import multiprocessing
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron import (
    adam,
    corrections,
    cpu,
    cpu_experts,
    gpu,
    optimizer_state,
    originals,
    packed,
    padding,
    replacements,
    replacements_cpu,
    routing,
)
from snaketron.model.megatron.originals import MISSING, original
from snaketron.model.megatron.replacements import TABLE
from snaketron.model.megatron.row import Replacement, stand_in

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = ("megatron.core.", "transformer_engine")
ROWS = {row.what: row for row in TABLE}
TESTED: set[str] = set()
CAN_GO = "the installed megatron-core does this itself: this row of `replacements.TABLE` can go"


def covers(what: str) -> Callable[[Any], Any]:
    """Say which row a test is about; on a machine with a GPU leave out those for CPUs."""
    TESTED.add(what)
    for_cpu = ROWS[what].machine == "CPU"
    return pytest.mark.skipif(backend.HAS_GPU and for_cpu, reason="a row for machines without a GPU")


def originals_of(what: str) -> dict[str, Any]:
    """The original pieces of a row, by the last part of their names."""
    return {name.rpartition(".")[2].rpartition(":")[2]: original(name) for name in ROWS[what].pieces}


@pytest.fixture
def unreplaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """unreplaced(row) puts the original pieces back for a test."""

    def put_back(what: str) -> None:
        for name in ROWS[what].pieces:
            monkeypatch.setattr(*originals.owner_of(name), original(name))

    return put_back


# --------------------------------------------------------------------------------------- the table itself


def test_each_row_has_a_test():
    from tests.gpu import test_replacements as on_gpu

    assert set(ROWS) == TESTED | on_gpu.TESTED


def test_rows_have_names_of_their_own_and_say_why():
    assert len(ROWS) == len(TABLE)
    for row in TABLE:
        assert row.why and row.upstream and row.until and (row.pieces or row.modules or row.in_objects)


@pytest.mark.parametrize("row", replacements.rows(backend.MACHINE), ids=lambda row: row.what)
def test_what_the_table_says_is_in_its_place(row: Replacement):
    for name, by in row.pieces.items():
        assert originals.current(name) is stand_in(by), name
    for module, by in row.modules.items():
        assert module in sys.modules and (by is not None or sys.modules[module] is None)


@pytest.mark.parametrize("row", [row for row in TABLE if row.in_objects], ids=lambda row: row.what)
def test_what_is_replaced_in_objects_is_there(row: Replacement):
    for name, by in row.in_objects.items():
        assert callable(original(name)) and callable(stand_in(by)), name


@pytest.mark.parametrize(
    "module", [adam, cpu, cpu_experts, gpu, packed, padding, routing], ids=lambda module: module.__name__
)
def test_what_calls_an_original_names_a_piece_of_the_table(module: ModuleType):
    """Another name would stand for what is there now: the replacement would call itself."""
    named = {v for v in vars(module).values() if isinstance(v, str) and v.startswith(PACKAGES)}
    assert named
    assert {name for name in named if not name.endswith(".")} <= {n for row in TABLE for n in row.pieces}


# ------------------------------------------------------------------------------------------- all machines


@covers("the count of tokens for the experts' bias")
def test_the_original_count_fails_for_a_padded_batch():
    """6 tokens and 4 experts."""
    count = originals_of("the count of tokens for the experts' bias")["_apply_expert_bias"]
    router = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(4))
    mapped, padding = torch.ones(6, 4, dtype=torch.bool), torch.tensor([False] * 4 + [True] * 2)
    with pytest.raises(RuntimeError):
        count(router, mapped, padding)
        pytest.fail(CAN_GO)


@pytest.fixture
def uncorrected(build, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Builds a model as megatron-core leaves it."""
    monkeypatch.setattr(corrections, "correct", lambda *_: None)
    return build


@covers("the type of the count of tokens")
def test_the_original_count_is_rounded_with_the_weights(uncorrected):
    modules = uncorrected(hybrid_layer_pattern="E").modules()
    router = next(m for m in modules if isinstance(m, TopKRouter))
    assert router.bfloat16().local_tokens_per_expert.dtype == torch.bfloat16, CAN_GO
    corrections.count_in_integers(router)
    assert router.bfloat16().local_tokens_per_expert.dtype == torch.int64


@covers("the epsilon of Mamba's gated norm")
def test_the_original_epsilon_is_a_constant(uncorrected):
    model = uncorrected(hybrid_layer_pattern="M", layernorm_epsilon=1e-3)
    (mixer,) = (m for m in model.modules() if isinstance(m, MambaMixer))
    assert mixer.norm.eps == 1e-5, CAN_GO
    corrections.set_epsilon(mixer, model.config)
    assert mixer.norm.eps == 1e-3


@covers("the mark of experts in one group")
def test_the_original_experts_of_one_group_are_marked_as_all_else(uncorrected):
    model = uncorrected(hybrid_layer_pattern="E")
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    assert experts and all(getattr(parameter, "allreduce", True) for parameter in experts), CAN_GO
    corrections.mark_experts(model)
    assert not any(parameter.allreduce for parameter in experts)


@covers("the padding in multi-token prediction")
def test_the_original_model_has_multi_token_prediction_balance_padding(build, unreplaced):
    """6 of 16 tokens are padding: the router of the decoder counts 10 x 2, that of the depth more."""
    unreplaced("the padding in multi-token prediction")
    model = build(hybrid_layer_pattern="M*E", mtp_num_layers=1, moe_aux_loss_coeff=0.0)
    ids, padding = torch.zeros(1, 16, dtype=torch.int64), torch.arange(16)[None] >= 10
    mask = torch.ones(2, 1, 16)
    model(ids, torch.arange(16)[None], None, labels=ids, loss_mask=mask, padding_mask=padding)
    routers = {name: m for name, m in model.named_modules() if isinstance(m, TopKRouter)}
    counts = {name: int(router.local_tokens_per_expert.sum()) for name, router in routers.items()}
    decoder, depth = counts.values()
    assert decoder == 10 * 2 and depth == 16 * 2, CAN_GO


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@covers("the shift of packed sequences")
def test_the_original_shift_works_on_each_sequence_by_itself():
    shift = originals_of("the shift of packed sequences")["_roll_tensor_packed_seq"]

    def operations(sequences: int) -> int:
        ends = torch.arange(sequences + 1, dtype=torch.int32) * 4
        params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
        with _Operations() as counted:
            shift(torch.arange(4 * sequences)[None], -1, -1, params)
        return counted.count

    assert operations(64) > operations(2) + 62, CAN_GO


@covers("the loss of multi-token prediction")
def test_the_original_loss_takes_no_weights_for_each_depth(build, unreplaced):
    """Twice the weights of the depth leave its loss as it is, where they are taken at all."""
    unreplaced("the loss of multi-token prediction")
    model = build(hybrid_layer_pattern="M*E", mtp_num_layers=1)
    ids = torch.arange(16)[None]
    with pytest.raises((RuntimeError, IndexError, ValueError, AssertionError)):
        model(ids, ids, None, labels=ids, loss_mask=torch.ones(2, 1, 16))
        pytest.fail(CAN_GO)


@covers("the logits of what is not trained")
def test_the_original_model_computes_logits_whose_loss_counts_nothing(build):
    """4 of 16 positions count; with the row, the output layer sees these and the losses are the same bits."""
    model = build(hybrid_layer_pattern="M*E", mtp_num_layers=1)
    ids, weights = torch.arange(16)[None], torch.zeros(2, 1, 16)
    weights[..., 4:8] = 0.5
    seen: list[int] = []
    model.output_layer.register_forward_hook(lambda *call: seen.append(len(call[1][0])))

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        seen.clear()
        model.zero_grad()
        losses = model(ids, ids, None, labels=ids, loss_mask=weights)
        (losses * weights[0]).sum().backward()
        return losses.detach() * weights[0], model.output_layer.weight.grad.clone()

    less, gradient = computed()
    assert seen == [4, 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "counted_rows", lambda *_: None)
        whole, expected = computed()
        assert seen == [16, 16], CAN_GO
    assert torch.equal(less, whole)
    torch.testing.assert_close(gradient, expected)


@covers("the optimizer's state in checkpoints")
def test_the_original_state_is_gathered_whole_by_every_process():
    """`get_parameter_state_dp_zero` is what gathers."""
    save = originals_of("the optimizer's state in checkpoints")["sharded_param_state_fully_reshardable"]
    asked: list[dict[str, Any]] = []

    def gather(**keys: Any) -> None:
        asked.append(keys)

    optimizer = SimpleNamespace(get_parameter_state_dp_zero=gather)
    save(optimizer, {}, metadata={"distrib_optim_fully_reshardable_mem_efficient": False})
    assert asked and asked[0]["return_on_all_ranks"], CAN_GO


@covers("the optimizer's groups in checkpoints")
def test_the_originals_ask_for_the_state_of_all_parameters_to_read_the_groups():
    class Copies(cpu.FusedAdam):
        """Copies its state to give it, as Transformer Engine's does with moments in bf16."""

        def state_dict(self) -> dict[str, Any]:
            given = super().state_dict()
            copied.append(sum(len(state) for state in given["state"].values()))
            return given

    copied: list[int] = []
    weight = torch.nn.Parameter(torch.ones(2))
    adam = Copies([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    weight.grad = torch.ones(2)
    adam.step()
    moments = adam.state[weight]
    optimizer = SimpleNamespace(
        optimizer=adam, grad_scaler=None, config=SimpleNamespace(fp16=False), ddp_config=SimpleNamespace()
    )
    optimizer.ddp_config.use_megatron_fsdp = False
    found = {}
    for which in (original, originals.current):
        given = which(optimizer_state.STATE_DICT)(optimizer)
        given["optimizer"]["param_groups"][0]["step"] = 7
        which(optimizer_state.LOAD_STATE_DICT)(optimizer, given)
        found[which], copied[:] = [*copied], []
        assert adam.param_groups[0]["step"] == 7 and adam.param_groups[0]["params"] == [weight]
        adam.param_groups[0]["step"] = 1
    assert found[original] == [2, 2], CAN_GO
    assert found[originals.current] == [0, 0]
    assert all(adam.state[weight][key] is value for key, value in moments.items()) and len(moments) == 2


@covers("the results of writing in the background")
def test_the_original_queue_is_a_process():
    """Forked here, which is quicker; megatron-core spawns it."""
    before = set(multiprocessing.active_children())
    queue = originals_of("the results of writing in the background")["get_write_results_queue"]("fork")
    started = set(multiprocessing.active_children()) - before
    for process in started:
        process.terminate()
        process.join()
    importlib.import_module(
        "megatron.core.dist_checkpointing.strategies.filesystem_async"
    )._results_queue = None
    assert started and queue is not None, CAN_GO


# ---------------------------------------------------------------------------------------------------- CPU


@covers("packages of the GPU")
def test_megatron_core_asks_for_packages_of_the_gpu():
    engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    assert "import transformer_engine" in inspect.getsource(engine), CAN_GO


@covers("Triton")
def test_megatron_core_imports_kernels_of_triton_also_where_it_is_not_installed():
    """Not only in a `try` that takes an ImportError."""
    path = importlib.util.find_spec("megatron.core.transformer.moe").submodule_search_locations[0]
    assert re.search("^import triton$", (Path(path) / "ops/paged_stash.py").read_text(), re.M), CAN_GO
    from megatron.core.transformer.moe import paged_stash

    assert paged_stash.paged_stash_copy_kernel is None


@covers("torch.cuda")
def test_the_original_torch_has_no_device_without_a_gpu():
    pieces = originals_of("torch.cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        pieces["current_device"]()
    with pytest.raises((RuntimeError, AssertionError)):
        pieces["cuda"](torch.zeros(1))
    schedules = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
    assert "torch.cuda.current_device()" in inspect.getsource(schedules), CAN_GO


@covers("the names of tensor types")
def test_the_optimizers_ask_for_names_of_types_on_a_gpu():
    assert originals_of("the names of tensor types")["type"](torch.zeros(1)) == "torch.FloatTensor"
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    assert "torch.cuda.FloatTensor" in inspect.getsource(module), CAN_GO


@covers('the device "cuda"')
@pytest.mark.parametrize("name", replacements_cpu.ON_CUDA)
def test_a_module_writes_the_device_cuda(name: str):
    source = inspect.getsource(importlib.import_module(name))
    assert '"cuda"' in source or "'cuda'" in source, CAN_GO
    with pytest.raises((RuntimeError, AssertionError)):
        original(f"{name}:torch").zeros(1, device="cuda")


@covers("the random numbers' state")
def test_the_original_setter_waits_for_cuda():
    before = torch.get_rng_state()
    other = torch.Generator().manual_seed(77).get_state()
    try:
        originals_of("the random numbers' state")["_set_cuda_rng_state"](other)
        assert torch.equal(torch.get_rng_state(), before), CAN_GO
    finally:
        torch.set_rng_state(before)


@covers("the sizes of what experts are sent")
def test_the_original_leaves_a_tensor_on_the_cpu_a_tensor():
    move = originals_of("the sizes of what experts are sent")["maybe_move_tensor_to_cpu"]
    assert torch.is_tensor(move(torch.zeros(2), as_numpy=True)), CAN_GO


@covers("Adam")
def test_the_original_optimizer_is_torchs_which_has_no_state_before_its_first_step():
    pieces = originals_of("Adam")
    assert pieces["USING_PYTORCH_OPTIMIZER"] and not pieces["HAVE_APEX_OR_TE"], CAN_GO
    weight = torch.nn.Parameter(torch.ones(1))
    assert pieces["Adam"] is torch.optim.AdamW and not pieces["Adam"]([weight]).state, CAN_GO


@covers("the norm of gradients")
def test_the_original_norm_adds_up_in_float32():
    """The norm of 1,024 x 1,024 numbers 0.1 is 102.4."""
    gradients = [[torch.full((1024, 1024), 0.1)]]
    (original_norm,) = originals_of("the norm of gradients").values()
    assert abs(float(original_norm(0, torch.zeros(1), gradients, False)[0]) - 102.4) > 0.01, CAN_GO
    assert float(cpu.l2_norm(0, torch.zeros(1), gradients, False)[0]) == pytest.approx(102.4, rel=1e-7)


@covers("Transformer Engine's layers that no spec chooses")
def test_the_original_layers_are_not_there_without_transformer_engine():
    pieces = originals_of("Transformer Engine's layers that no spec chooses")
    assert not pieces["HAVE_TE"] and pieces["TELinear"] is None
    with pytest.raises((RuntimeError, ImportError, TypeError, AssertionError, AttributeError, ValueError)):
        pieces["TENorm"](SimpleNamespace(normalization="RMSNorm"), 8)
        pytest.fail(CAN_GO)


@covers("mamba-ssm")
def test_the_original_mixer_wants_mamba_ssm():
    pieces = originals_of("mamba-ssm")
    assert not pieces["HAVE_MAMBA_SSM"] and pieces["mamba_split_conv1d_scan_combined"] is None
    with pytest.raises(ImportError):
        pieces["_check_mamba_sequence_packing_support"](for_inference_not_training=False)
        pytest.fail(CAN_GO)


@covers("the partition of packed sequences")
def test_the_original_asks_transformer_engine_for_the_positions():
    pieces = originals_of("the partition of packed sequences")
    assert pieces["tex"] in (None, MISSING) and not pieces["is_te_min_version"]("1.10.0"), CAN_GO


# ---------------------------------------------------------------------------------------------------- GPU


def source(name: str) -> str:
    return inspect.getsource(original(name))


@covers("linear layers and experts of one rank")
def test_the_original_layers_of_one_rank_are_functions_in_python():
    """The product and its gradients are the same numbers."""
    of = originals_of("linear layers and experts of one rank")
    weight, x = torch.randn(6, 8, requires_grad=True), torch.randn(5, 2, 8, requires_grad=True)
    options = {"gradient_accumulation_fusion": False, "allreduce_dgrad": False, "sequence_parallel": False}
    results = []
    for function in (of["_forward_impl"], cpu.linear):
        out = function(None, x, weight, None, **options)
        gradients = torch.autograd.grad(out.square().sum(), (x, weight))
        results.append((out.grad_fn.name(), out, *gradients))
    (name, *numbers), (_, *own) = results
    assert name == "LinearWithGradAccumulationAndAsyncCommunicationBackward", CAN_GO
    assert all(torch.equal(a, b) for a, b in zip(numbers, own, strict=True))


@covers("linear layers and experts of one rank")
def test_experts_without_a_function_for_each_are_the_original_ones(build, unreplaced):
    """Outputs and gradients in float64: for experts with tokens, and for one that gets none."""
    model = build().double()
    experts = next(module for module in model.modules() if isinstance(module, SequentialMLP))
    counts = torch.tensor([5, 0, *[3] * (experts.num_local_experts - 2)])
    width = experts.local_experts[0].linear_fc1.weight.shape[1]
    tokens = torch.randn(int(counts.sum()), width, dtype=torch.float64, requires_grad=True)
    probs = torch.rand(len(tokens), dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(tokens)
    given = [tokens, probs, *experts.parameters()]

    def results() -> list[torch.Tensor]:
        out, bias = experts(tokens, counts, probs)
        assert bias is None
        return [out, *torch.autograd.grad((out * weights).sum(), given)]

    own = results()
    assert own[0].grad_fn.name() == "_ExpertsBackward"
    unreplaced("linear layers and experts of one rank")
    for found, expected in zip(own, results(), strict=True):
        torch.testing.assert_close(found, expected)


@covers("the sums of gradients and the weights of one rank")
def test_the_original_sums_of_one_rank_ask_gloo():
    of = originals_of("the sums of gradients and the weights of one rank")
    values, group = torch.arange(3.0), torch.distributed.group.WORLD
    for original_piece, own in (
        (of["dist_all_gather_func"], cpu.gather_weights),
        (of["dist_reduce_scatter_func"], cpu.scatter_gradients),
    ):
        assert original_piece(values, values, group=group, async_op=True) is not None, CAN_GO
        assert own(values, values, group=group) is None and values.tolist() == [0, 1, 2]


@covers("APEX's sum of gradients")
def test_the_linear_layers_ask_for_the_module_of_apex():
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    assert "import fused_weight_gradient_mlp_cuda" in inspect.getsource(layers), CAN_GO


@covers("the optimizer's step")
def test_the_original_norm_is_a_number_of_the_host():
    """3 and 4 of two parts give 5."""
    norm = originals_of("the optimizer's step")["get_grad_norm"]
    parts = [SimpleNamespace(get_grad_norm=lambda value=value: torch.tensor(value)) for value in (3.0, 4.0)]
    found = norm(
        SimpleNamespace(chained_optimizers=parts, grads_states_parallel_group_is_shared=lambda: False)
    )
    assert isinstance(found, float) and found == 5.0, CAN_GO


@covers("the optimizer's step in bf16")
def test_the_original_division_and_clipping_are_passes_over_the_gradients():
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    scale = inspect.getsource(buffers._ParamAndGradBuffer.scale_gradients)
    clip = inspect.getsource(
        importlib.import_module("megatron.core.optimizer.clip_grads").clip_grad_by_total_norm_fp32
    )
    assert "self.grad_data *= scaling_factor" in scale, CAN_GO
    assert "multi_tensor_scale_impl, dummy_overflow_buf, [grads, grads]" in clip, CAN_GO


@covers("the zeros of gradients")
def test_the_original_sets_all_gradients_to_zero():
    reset = importlib.import_module(
        "megatron.core.distributed.param_and_grad_buffer"
    )._ParamAndGradBuffer.reset
    buffer = SimpleNamespace(grad_data=torch.ones(4), extra_main_grads=[])
    reset(buffer)
    assert not buffer.grad_data.any(), CAN_GO


@covers("the gradient of embeddings")
def test_the_original_embeddings_have_a_gradient_of_the_whole_table():
    weight = torch.nn.Parameter(torch.ones(6, 2))
    layer = SimpleNamespace(
        weight=weight,
        tp_group=SimpleNamespace(size=lambda: 1),
        gtp_remat_size=1,
        deterministic_mode=False,
        reduce_scatter_embeddings=False,
    )
    [forward] = originals_of("the gradient of embeddings").values()
    forward(layer, torch.tensor([[1, 3]])).sum().backward()
    assert weight.grad is not None and weight.grad.shape == (6, 2), CAN_GO


@covers("the placeholder of the output layer")
def test_the_original_gives_autograd_a_gradient_that_is_not_used():
    text = source(
        "megatron.core.tensor_parallel.layers:LinearWithGradAccumulationAndAsyncCommunication.backward"
    )
    assert "grad_weight = get_dummy_wgrad(list(weight.main_grad.shape), input.dtype)" in text, CAN_GO


@covers("the logits of routers")
def test_the_original_router_copies_its_input_in_fp32():
    text = source("megatron.core.transformer.moe.moe_utils:RouterGatingLinearFunction.backward")
    assert "inp.to(ctx.router_dtype), grad_output, ctx.router_dtype" in text, CAN_GO


@covers("the acceptance of predicted tokens")
def test_the_original_loss_always_counts_accepted_tokens():
    text = source("megatron.core.models.hybrid.hybrid_model:process_mtp_loss")
    assert "_compute_mtp_acceptance_counts(" in text, CAN_GO


@covers("the scan of Mamba layers")
def test_the_original_scan_copies_its_input():
    assert '"l b d -> b l d").contiguous()' in source(
        "megatron.core.ssm.mamba_mixer:MambaMixer._ssm_training"
    ), CAN_GO


@covers("the routed experts")
def test_the_original_experts_take_numbers_of_tokens_from_the_host():
    assert "tokens_per_expert.tolist()" in source(
        "megatron.core.transformer.moe.experts:TEGroupedMLP.forward"
    ), CAN_GO
