"""Whether megatron-core still needs the replacements on machines without a GPU; see `test_replacements`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import cpu, packed, replacements_cpu
from snaketron.model.megatron.originals import MISSING, original
from tests.unit.model.megatron.rows import CAN_GO, covers, originals_of

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP


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
