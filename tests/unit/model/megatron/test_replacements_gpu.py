"""Whether megatron-core still needs the replacements on GPUs, as far as any machine can tell.

`test_replacements` says how; tests/gpu has the rows that only a GPU can judge.
"""

from __future__ import annotations

import importlib.util
import inspect
from types import SimpleNamespace

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import corrections
from snaketron.model.megatron.originals import original
from snaketron.model.megatron.row import stand_in
from tests.unit.model.megatron.rows import CAN_GO, ROWS, covers, originals_of

import pytest
import torch


def source(name: str) -> str:
    return inspect.getsource(original(name))


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


class Recordings:
    """Recordings of layers in fp8: which of them rounded its weights anew, in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, one_note: bool = True) -> None:
        self.graphs = importlib.import_module("megatron.core.transformer.cuda_graphs")
        [(name, by)] = ROWS["the rounding of weights in recordings"].pieces.items()
        self.attribute = name.rpartition(".")[2]
        self.members = {self.attribute: stand_in(by)} if one_note else {}
        self.mark: list[bool] = [False]
        self.rounded: list[str] = []
        recipes = SimpleNamespace(common=SimpleNamespace(recipe=SimpleNamespace(DelayedScaling=str)))
        monkeypatch.setattr(self.graphs, "te", recipes, raising=False)
        manager = SimpleNamespace(get_fp8_recipe=lambda: None)
        monkeypatch.setattr(self.graphs, "FP8GlobalStateManager", manager, raising=False)
        monkeypatch.setattr(self.graphs, "_set_skip_fp8_weight_update_tensor", self.mark.append)

    def made(self, layer: str, *, first: bool = True) -> SimpleNamespace:
        made = type("Recording", (SimpleNamespace,), self.members)()
        vars(made).update(status=self.graphs._GraphStatus.FWD_READY, fwd_graph_input_surface=[])
        vars(made).update(
            fp8_enabled=True, is_first_layer=first, use_stream=False, fwd_graph_output_surface=()
        )
        made.fwd_graph = SimpleNamespace(replay=lambda: None if self.mark[-1] else self.rounded.append(layer))
        setattr(made, self.attribute, None)
        return made

    def compute(self, recording: SimpleNamespace, *, first_call: bool) -> None:
        self.graphs._CudagraphReplayNode.forward(SimpleNamespace(), recording, first_call)


@covers("the rounding of weights in recordings")
@pytest.mark.parametrize("replaced", [False, True])
def test_the_original_rounds_weights_no_more_after_a_second_depth(
    replaced: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two steps of one micro-batch: the decoder rounds its weights in each, the second depth in none."""
    recordings = Recordings(monkeypatch, one_note=replaced)
    decoder, second_depth = recordings.made("decoder"), recordings.made("second depth")
    for _step in range(2):
        recordings.compute(decoder, first_call=True)
        recordings.compute(second_depth, first_call=False)
    assert recordings.rounded == ["decoder"] * (2 if replaced else 1), CAN_GO


@covers("the first of the recorded layers")
@pytest.mark.parametrize("corrected", [False, True])
def test_the_original_rounds_no_weights_after_a_first_layer_of_experts(
    corrected: bool, monkeypatch: pytest.MonkeyPatch
):
    """Two steps of two micro-batches: a decoder of EM, and a depth of attention, called twice."""
    recordings = Recordings(monkeypatch)
    decoder = SimpleNamespace(layers=[SimpleNamespace(), SimpleNamespace()])
    depth = SimpleNamespace(layers=[SimpleNamespace()])
    for stack in (decoder, depth):
        recordings.graphs.annotate_first_last_layer(stack.layers)
        if corrected:
            corrections.let_each_layer_mark(stack)
    mamba = recordings.made("mamba", first=decoder.layers[1].is_first_layer)
    attention = recordings.made("attention", first=depth.layers[0].is_first_layer)
    found = []
    for _step in range(2):
        for first in (True, False):
            recordings.compute(mamba, first_call=first)
            recordings.compute(attention, first_call=first)
            recordings.compute(attention, first_call=False)
        found.append(recordings.rounded.copy())
        recordings.rounded.clear()
    # The first step finds the mark unset.
    assert found == [["mamba", "attention"], ["mamba", "attention"] if corrected else ["attention"]], CAN_GO
