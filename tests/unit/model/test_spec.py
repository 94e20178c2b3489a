"""The architecture: its parts, its layouts, and what training does to the expert bias."""

from snaketron.config import Model, Parallel
from snaketron.model import backend, spec

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.quantization.quant_config import MatchContext
from megatron.core.transformer.module import Float16Module


def routers(model):
    return [m for m in model.modules() if getattr(m, "expert_bias", None) is not None]


def test_parameters_by_hand(build):
    model = build(vocab_size=200)  # padded to 256
    hidden, vocabulary = 128, 256
    # in_proj to z x B C dt, convolution over x B C, dt_bias A_log D, two norms, out_proj
    mamba = 128 * (256 + 256 + 32 + 32 + 8) + 320 * (4 + 1) + 3 * 8 + 128 + 256 + 256 * 128
    attention = 128 * (8 + 2 + 2) * 16 + 8 * 16 * 128 + 128
    moe = 8 * 128 + 2 * 128 * 64 + 8 * 2 * 64 * 128 + 2 * 128 * 256 + 128
    # enorm, hnorm, eh_proj, final norm, and one block for both depths
    mtp = 3 * hidden + 2 * hidden * hidden + attention + moe
    expected = 2 * vocabulary * hidden + 3 * mamba + attention + 3 * moe + hidden + mtp
    assert sum(p.numel() for p in model.parameters()) == expected


def test_only_routed_experts_leave_the_gradient_all_reduce(build):
    names = {name for name, p in build().named_parameters() if not getattr(p, "allreduce", True)}
    assert len(names) == 4 * 8 * 2  # layers, experts, matrices
    assert all(".mlp.experts." in name for name in names)


def test_configuration_is_that_of_nemotron_3_super():
    config = spec.transformer_config(Model(precision="bf16"), Parallel(tensor_model_parallel_size=2))
    assert config.sequence_parallel and config.params_dtype is torch.bfloat16
    assert config.activation_func(torch.tensor([-2.0, 3.0])).tolist() == [0.0, 9.0]
    assert (config.moe_router_score_function, config.moe_router_dtype) == ("sigmoid", "fp32")
    assert config.mtp_use_repeated_layer and config.calculate_per_token_loss
    assert spec.transformer_config(Model(mtp_num_layers=0), Parallel()).mtp_num_layers is None


def test_every_norm_has_the_epsilon_of_the_configuration(build):
    """The gated norm of Mamba-2 too, for which megatron-core writes 1e-5."""
    model = build(hybrid_layer_pattern="ME*-", mtp_hybrid_layer_pattern="ME", layernorm_epsilon=1e-3)
    epsilons = {name: m.eps for name, m in model.named_modules() if hasattr(m, "eps")}
    assert epsilons and set(epsilons.values()) == {1e-3}
    gated = [name for name in epsilons if name.endswith(".mixer.norm")]
    assert gated == ["decoder.layers.0.mixer.norm", "mtp.layers.0.mtp_model_layer.layers.0.mixer.norm"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_expert_bias_moves_towards_experts_with_few_tokens(build, precision):
    model = build(precision=precision, moe_router_bias_update_rate=1e-3)
    config = model.config
    wrapped = Float16Module(config, model) if precision == "bf16" else model
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    trained = DistributedDataParallel(config, settings, wrapped)
    ids = torch.randint(0, 256, (4, 200)).to(backend.device())
    for _ in range(2):  # micro-batches
        trained(
            ids, None, None, labels=ids, loss_mask=torch.ones_like(ids, dtype=torch.float32)
        ).sum().backward()
    loads = [router.local_tokens_per_expert.tolist() for router in routers(model)]
    # Every token of both micro-batches visits two experts; in multi-token prediction at both depths.
    assert [sum(load) for load in loads] == [3200, 3200, 3200, 6400]
    finalize_model_grads([trained], torch.tensor(1600))
    for router, load in zip(routers(model), loads, strict=True):
        mean = sum(load) / 8
        expected = torch.tensor([1e-3 * ((mean > n) - (mean < n)) for n in load])
        torch.testing.assert_close(router.expert_bias.cpu(), expected, atol=1e-9, rtol=0)
        assert router.local_tokens_per_expert.sum() == 0


@torch.no_grad()
def test_the_depths_of_multi_token_prediction_are_those_of_the_formula(build):
    """DeepSeek-V3 (arXiv 2412.19437), equations 21 to 23, with dense layers and one block for both depths.

    The embedding comes first in what is projected, as in published checkpoints.
    """
    keys = {"hybrid_layer_pattern": "-", "mtp_hybrid_layer_pattern": "-", "mtp_num_layers": 2}
    model = build(**keys, init_method_std=0.2)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    logits: list[torch.Tensor] = []
    model.output_layer.register_forward_hook(lambda *call: logits.append(call[2][0][:, 0].clone()))
    ids = torch.randint(0, 256, (9,), device=backend.device())
    model(ids[None], None, None)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def dense(x: torch.Tensor, prefix: str) -> torch.Tensor:
        inner = norm(x, f"{prefix}linear_fc1.layer_norm_weight") @ weights[f"{prefix}linear_fc1.weight"].T
        return x + inner.relu().square() @ weights[f"{prefix}linear_fc2.weight"].T

    embeddings, block = weights["embedding.word_embeddings.weight"], "mtp.layers.0."
    hidden = norm(dense(embeddings[ids], "decoder.layers.0.mlp."), "decoder.final_norm.weight")
    states = [hidden]
    for depth in (1, 2):
        following = torch.cat([ids[depth:], ids.new_zeros(depth)])
        both = [norm(embeddings[following], f"{block}enorm.weight"), norm(hidden, f"{block}hnorm.weight")]
        joined = torch.cat(both, -1) @ weights[f"{block}eh_proj.weight"].T
        hidden = dense(joined, f"{block}mtp_model_layer.layers.0.mlp.")
        hidden = norm(hidden, f"{block}final_layernorm.weight")
        states.append(hidden)
    *predicted, now = logits  # multi-token prediction comes first
    for found, state in zip([now, *predicted], states, strict=True):
        expected = state @ weights["output_layer.weight"].T
        assert float((found - expected).abs().max()) < 0.05  # of about 10; a GPU has TF32


def test_padding_is_kept_out_of_the_load_of_experts(build):
    model = build(mtp_num_layers=0)
    ids = torch.randint(0, 256, (2, 50)).to(backend.device())
    padding = torch.arange(50, device=ids.device).expand(2, -1) >= 40
    model(ids, None, None, padding_mask=padding)
    assert [int(router.local_tokens_per_expert.sum()) for router in routers(model)] == [2 * 40 * 2] * 3


def test_expert_bias_is_in_the_checkpoint_of_each_router(build):
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model = build()
    names = {
        name for name in model.sharded_state_dict(metadata={"dp_cp_group": group}) if "expert_bias" in name
    }
    assert len(names) == len(routers(model)) == 4


@pytest.mark.parametrize("num_threads", [1, 2])
def test_same_seed_gives_the_same_bits(build, num_threads):
    ids = torch.randint(0, 256, (2, 100)).to(backend.device())

    def gradients():
        torch.manual_seed(0)
        from megatron.core import tensor_parallel

        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        model = build()
        model(
            ids, None, None, labels=ids, loss_mask=torch.ones_like(ids, dtype=torch.float32)
        ).sum().backward()
        return [p.grad for p in model.parameters()]

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder.layers.0.mixer.in_proj", "nvfp4"),
        ("decoder.layers.0.mixer.out_proj", "mxfp8"),
        ("decoder.layers.7.self_attention.linear_qkv", "bf16"),
        ("decoder.layers.1.mlp.fc1_latent_proj", "bf16"),
        ("decoder.layers.1.mlp.experts.linear_fc1", "nvfp4"),
        ("mtp.layers.0.eh_proj", "bf16"),
    ],
)
def test_modules_of_nemotron_3_super_are_quantized_as_in_its_recipe(name, kind):
    recipe = spec.low_precision(Model(precision="nvfp4"))["quant_recipe"]
    assert recipe.match_to_config_key(MatchContext(name, 0)) == kind


def test_the_last_layers_stay_in_bf16_where_asked():
    fields = spec.low_precision(Model(precision="fp8_current", bf16_layers_at_end=14))
    assert (fields["num_layers_at_start_in_bf16"], fields["num_layers_at_end_in_bf16"]) == (0, 14)
    assert spec.low_precision(Model(precision="bf16", bf16_layers_at_end=14)) == {}


def test_megatron_core_is_not_asked_to_compute_the_scan_again():
    assert spec.recomputation(["scan"]) == spec.recomputation([]) == {}
    assert spec.recomputation(["scan", "moe"]) == spec.recomputation(["moe"])


@pytest.mark.parametrize("modules", [["layer"], ["moe"], ["shared_experts"], ["core_attn"], ["mlp"]])
def test_what_is_computed_again_changes_no_gradient(modules):
    def gradients(recompute):
        torch.manual_seed(0)
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        model = Model(init_method_std=0.02)
        config = spec.transformer_config(model, Parallel(), **spec.recomputation(recompute))
        built = spec.build_model(config, model, Parallel(), 256, 512)
        ids = torch.arange(100)[None].to(backend.device())
        built(ids, None, None, labels=ids, loss_mask=torch.ones_like(ids).float()).sum().backward()
        return [p.grad for p in built.parameters()]

    for kept, again in zip(gradients([]), gradients(modules), strict=True):
        torch.testing.assert_close(again, kept)
