"""Whether the installed megatron-core still needs each row of the table of replacements.

A test runs the original piece and shows its fault. One that fails after an upgrade says that its row can go.
Here are the table itself and the rows for all machines; those for CPUs and for GPUs have files of their own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron import (
    adam,
    corrections,
    cpu,
    cpu_experts,
    gathering,
    gpu,
    optimizer_state,
    originals,
    packed,
    padding,
    replacements,
    routing,
)
from snaketron.model.megatron.originals import original
from snaketron.model.megatron.replacements import TABLE
from snaketron.model.megatron.row import Replacement, stand_in
from tests.unit.model.megatron.rows import CAN_GO, ROWS, TESTED, covers, originals_of

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = ("megatron.core.", "transformer_engine")


# --------------------------------------------------------------------------------------- the table itself


def test_each_row_has_a_test():
    from tests.gpu import test_replacements as on_gpu
    from tests.unit.model.megatron import test_replacements_cpu, test_replacements_gpu

    assert test_replacements_cpu.covers is test_replacements_gpu.covers is covers  # all add to `TESTED`
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


@covers("the weight of the load balancing loss")
def test_the_original_weight_is_that_of_the_tokens_of_a_rank(monkeypatch: pytest.MonkeyPatch):
    """This rank has 4 tokens of two experts each; the other one has 2, and padding."""
    here, there = torch.ones(4, 2, dtype=torch.bool), torch.tensor([2, 2])
    monkeypatch.setattr(
        moe_utils, "reduce_from_tensor_model_parallel_region", lambda counts, _: counts + there
    )
    two = SimpleNamespace(size=lambda: 2)
    for which, expected in ((original, 4), (originals.current, 3)):
        found = which(padding.COUNT_TOKENS)(here, two, topk=2, with_padding_mask=True)
        per_expert, share, total = found
        assert (per_expert.tolist(), float(share), float(total)) == ([6, 6], expected, 6), CAN_GO


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


@covers("the load balancing loss of several depths")
def test_the_original_routers_do_not_know_of_multi_token_prediction(uncorrected):
    model = uncorrected(hybrid_layer_pattern="M", mtp_num_layers=2, mtp_hybrid_layer_pattern="*E")
    (router,) = (m for m in model.modules() if isinstance(m, TopKRouter))
    assert not router.is_mtp_layer, CAN_GO
    corrections.share_balance(model.mtp)
    assert router.is_mtp_layer


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


@covers("tokens that are gathered")
def test_the_original_gathers_the_probabilities_of_all_experts(build, monkeypatch: pytest.MonkeyPatch):
    """Two processes with the same four tokens and four of eight experts each."""
    (original_class,) = originals_of("tokens that are gathered").values()
    model = build(hybrid_layer_pattern="E", mtp_num_layers=0)
    (layer,) = (m for m in model.modules() if isinstance(m, MoELayer))
    tokens, scores = torch.randn(4, 1, 16), torch.rand(4, 8)
    chosen = torch.zeros(4, 8, dtype=torch.bool).index_fill_(1, torch.tensor([0, 6]), True)

    def sent(dispatcher: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []

        def gather(x: torch.Tensor, **_: Any) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return torch.cat([x, x])

        def exchange(_: Any, x: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return torch.cat([x[:4], x[:4]])  # what both have for the first process

        for module in (token_dispatcher, gathering):
            monkeypatch.setattr(module, "gather_from_sequence_parallel_region", gather)
        monkeypatch.setattr(gathering, "all_to_all", exchange)
        dispatcher.ep_size = 2
        rows, numbers, weights = dispatcher.dispatch_postprocess(
            *dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, chosen, scores))
        )
        assert torch.equal(rows, torch.cat([tokens[:, 0]] * 2)) and numbers.tolist() == [8, 0, 0, 0]
        assert torch.equal(weights, torch.cat([scores[:, 0]] * 2))
        return shapes

    groups = layer.token_dispatcher
    about = (4, [0, 1, 2, 3], layer.config)
    collection = SimpleNamespace(ep=groups.ep_group, expt_tp=groups.tp_group, tp_ep=groups.tp_ep_group)
    assert sent(original_class(*about, collection)) == [(4, 8), (4, 8), (4, 16)], CAN_GO
    assert sent(gathering.GatherDispatcher(*about, collection)) == [(8, 4), (4, 16)]


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
