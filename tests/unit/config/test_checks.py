"""What cannot be together is refused, with both numbers."""

from __future__ import annotations

from snaketron.config import load
from tests.unit.config.refusals import merged, refusal

import pytest

# The numbers of the messages below, whatever the defaults are.
BASE = {
    "model": {
        "hybrid_layer_pattern": "MEM*EME",
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "mamba_num_heads": 8,
        "mamba_num_groups": 2,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 128,
    },
    "pretrain": {"seq_length": 256, "global_batch_size": 8, "micro_batch_size": 4},
    "sft": {"global_batch_size": 4},
    "sft_data": {"pack_size": 1024},
}

PHASE = {"name": "a", "tokens": 1_000_000, "blend": [{"corpus": "docs", "weight": 1}]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"corpora": [{"name": "docs", "paths": ["a.jsonl"]}, {"name": "docs", "paths": ["b.jsonl"]}]},
            "corpora: the name 'docs' is used twice",
        ),
        (
            {"chats": [{"name": "q", "paths": ["a.jsonl"]}, {"name": "q", "paths": ["b.jsonl"]}]},
            "chats: the name 'q' is used twice",
        ),
        ({"pretrain": {"phases": [PHASE, PHASE]}}, "pretrain.phases: the name 'a' is used twice"),
        (
            {"pretrain": {"phases": [PHASE | {"blend": [{"corpus": "doc", "weight": 1}]}]}},
            "pretrain.phases[0].blend[0].corpus: 'doc' is not defined; did you mean 'docs'?",
        ),
        (
            {"sft": {"blend": [{"source": "tools", "weight": 1}, {"source": "zzz", "weight": 1}]}},
            "sft.blend[1].source: 'zzz' is not defined; known: questions, tools",
        ),
        (
            {
                "pretrain": {
                    "phases": [PHASE, PHASE | {"name": "b", "blend": 2 * [{"corpus": "docs", "weight": 1}]}]
                }
            },
            "pretrain.phases[1].blend: 'docs' stands there 2 times; leave one, with the weight 2 of all",
        ),
        (
            {"sft": {"blend": [{"source": "tools", "weight": 0.5}, {"source": "tools", "weight": 0.25}]}},
            "sft.blend: 'tools' stands there 2 times; leave one, with the weight 0.75 of all",
        ),
        (
            {
                "corpora": [{"name": "docs", "paths": ["a"], "split": "valid"}],
                "pretrain": {"phases": [PHASE]},
            },
            "pretrain.phases[0].blend: names nothing to train on ('docs' is of split valid); add a source of "
            "split train or null",
        ),
        (
            {
                "chats": [{"name": name, "paths": [name], "split": name} for name in ("valid", "test")],
                "sft": {"blend": [{"source": name, "weight": 1} for name in ("valid", "test")]},
            },
            "sft.blend: names nothing to train on ('valid' is of split valid, 'test' is of split test); add "
            "a source of split train or null",
        ),
        (
            {"corpora": [{"name": "docs", "tokens": {"train": ["a"]}, "split": "valid"}]},
            "corpora[0].split: has no effect on tokens that were made elsewhere; leave it out",
        ),
        (
            {"chats": [{"name": "q", "packs": {"train": ["a"]}, "split": "train"}]},
            "chats[0].split: has no effect on packs that were made elsewhere; leave it out",
        ),
        (
            {"sft_data": {"template_arguments": {"tools": []}}},
            "sft_data.template_arguments.tools: not an argument, it comes from the conversation; "
            "leave it out",
        ),
        (
            {"chats": [{"name": "q", "paths": ["a"], "reasoning": {"stripped": 0.5, "truncated": 0.6}}]},
            "chats[0].reasoning: stripped 0.5 + low_effort 0.0 + truncated 0.6 are more than "
            "all conversations",
        ),
        (
            {"tokenizer": {"chat_template": None}},
            "tokenizer.chat_template: null needs tokenizer.path, which the template would come from",
        ),
        (
            {"tokenizer": {"text": []}},
            "tokenizer.text: name the files to train a tokenizer on, or give tokenizer.path",
        ),
        (
            {"model": {"num_query_groups": 3}},
            "model.num_attention_heads 8 is not divisible by model.num_query_groups 3",
        ),
        (
            {"model": {"mamba_num_groups": 3}},
            "model.mamba_num_heads 8 is not divisible by model.mamba_num_groups 3",
        ),
        (
            {
                "model": {
                    "hybrid_layer_pattern": "M",
                    "mtp_hybrid_layer_pattern": "****E",
                    "mtp_num_layers": 1,
                }
            },
            "model.mtp_hybrid_layer_pattern: its layer 5 is an E, and megatron-core records the load of 2 "
            "layers: those of model.hybrid_layer_pattern, and model.mtp_num_layers 1",
        ),
        (
            {"sft": {"optimizer": {"gradient_precision": "bf16"}}},
            "sft.optimizer.gradient_precision bf16 has no effect under model.precision fp32, whose gradients "
            "are fp32; leave it out",
        ),
        (
            {"model": {"moe_router_topk": 9}},
            "model.moe_router_topk 9 is more than model.num_moe_experts 8",
        ),
        (
            {"model": {"num_moe_experts": 1, "moe_router_topk": 1}},
            "model.num_moe_experts 1: transformers cannot compute a model with one routed expert; give two, "
            "or take dense layers (-)",
        ),
        # 8 query heads, 2 groups, 8 Mamba heads, 2 Mamba groups, 256 tokens.
        (
            {"pretrain": {"parallel": {"tensor_model_parallel_size": 3}}},
            "model.num_attention_heads 8 is not divisible by pretrain.parallel.tensor_model_parallel_size 3",
        ),
        # Fewer groups than processes are repeated, so many times in each.
        (
            {"model": {"num_query_groups": 4}, "sft": {"parallel": {"tensor_model_parallel_size": 6}}},
            "sft.parallel.tensor_model_parallel_size 6 is not divisible by model.num_query_groups 4",
        ),
        (
            {"model": {"num_query_groups": 8}, "sft": {"parallel": {"tensor_model_parallel_size": 3}}},
            "model.num_query_groups 8 is not divisible by sft.parallel.tensor_model_parallel_size 3",
        ),
        (
            {"sft": {"parallel": {"tensor_model_parallel_size": 4}}},
            "model.mamba_num_groups 2 is not divisible by sft.parallel.tensor_model_parallel_size 4",
        ),
        (
            {"pretrain": {"parallel": {"expert_model_parallel_size": 3, "data_parallel_size": 3}}},
            "model.num_moe_experts 8 is not divisible by pretrain.parallel.expert_model_parallel_size 3",
        ),
        (
            {"pretrain": {"parallel": {"expert_tensor_parallel_size": 3}}},
            "model.moe_ffn_hidden_size 128 is not divisible by "
            "pretrain.parallel.expert_tensor_parallel_size 3",
        ),
        (  # 2 x 1 x 1 x 2 processes, 2 in each pipeline stage
            {
                "sft": {
                    "parallel": {
                        "pipeline_model_parallel_size": 2,
                        "data_parallel_size": 2,
                        "expert_model_parallel_size": 4,
                    }
                }
            },
            "sft.parallel.tensor_model_parallel_size x context_parallel_size x data_parallel_size = 2 is not "
            "divisible by expert_model_parallel_size x expert_tensor_parallel_size = 4",
        ),
        (
            {"pretrain": {"parallel": {"pipeline_model_parallel_size": 8}}},
            "pretrain.parallel.pipeline_model_parallel_size 8 is more than the 7 layers of "
            "model.hybrid_layer_pattern, and each stage needs one",
        ),
        (
            {"pretrain": {"parallel": {"data_parallel_size": 3}}},
            "pretrain.global_batch_size 8 is not divisible by micro_batch_size 4 x data_parallel_size 3 = 12",
        ),
        (
            {"pretrain": {"phases": [PHASE | {"global_batch_size": 6}]}},
            "pretrain.phases[0].global_batch_size 6 is not divisible by "
            "micro_batch_size 4 x data_parallel_size 1 = 4",
        ),
        (
            {"lora": {"target_modules": ["in_proj", "linear_qvk"]}},
            "lora.target_modules[1]: 'linear_qvk' is no linear layer; did you mean 'linear_qkv'?",
        ),
        ({"lora": {"target_modules": []}}, "lora.target_modules: name the layers to adapt"),
        (
            {"sft": {"parallel": {"data_parallel_size": 3}}},
            "sft.global_batch_size 4 is not divisible by micro_batch_size 1 x data_parallel_size 3 = 3",
        ),
        (
            {"pretrain": {"seq_length": 257, "parallel": {"tensor_model_parallel_size": 2}}},
            "pretrain.seq_length 257 is not divisible by tensor 2 x context 1 parallel parts = 2",
        ),
        (  # two chunks a process under context parallelism
            {
                "pretrain": {
                    "phases": [PHASE | {"seq_length": 258}],
                    "parallel": {"context_parallel_size": 2},
                }
            },
            "pretrain.phases[0].seq_length 258 is not divisible by tensor 1 x context 2 parallel parts = 4",
        ),
        (
            {"sft_data": {"pack_size": 1001}, "sft": {"parallel": {"tensor_model_parallel_size": 2}}},
            "sft_data.pack_size 1001 is not divisible by tensor 2 x context 1 parallel parts = 2",
        ),
        (
            {"sft": {"parallel": {"context_parallel_size": 2}}, "sft_data": {"padding_multiple": 2}},
            "sft_data.padding_multiple 2 is not divisible by 2 x sft.parallel.context_parallel_size 2 = 4",
        ),
        (
            {"sft_data": {"padding_multiple": 48}},
            "sft_data.pack_size 1024 is not divisible by sft_data.padding_multiple 48",
        ),
        (
            {"sft": {"train_iters": 50, "switch_loss_average_after": 50}},
            "sft.switch_loss_average_after 50 is not less than sft.train_iters 50, so it would never switch; "
            "leave it out",
        ),
        (
            {"sft": {"parallel": {"context_parallel_size": 16}}},
            "model.mamba_num_heads 8 is not divisible by sft.parallel.tensor_model_parallel_size x "
            "context_parallel_size = 16",
        ),
        ({"sft": {"train_iters": 10}}, "sft.warmup_iters 10 is not less than sft.train_iters 10"),
        (
            {"pretrain_data": {"valid_fraction": 0.5, "test_fraction": 0.5}},
            "pretrain_data: valid_fraction 0.5 + test_fraction 0.5 leave nothing to train on",
        ),
        (
            {"sft_data": {"valid_fraction": 0.75, "test_fraction": 0.25}},
            "sft_data: valid_fraction 0.75 + test_fraction 0.25 leave nothing to train on",
        ),
        (
            {"sft": {"optimizer": {"learning_rate": 0.01, "min_learning_rate": 0.02}}},
            "sft.optimizer.min_learning_rate 0.02 is more than learning_rate 0.01",
        ),
        (  # one step of 8 x 256 = 2,048 tokens
            {"pretrain": {"phases": [PHASE | {"tokens": 1}], "warmup_tokens": 2000, "decay_tokens": 49}},
            "pretrain.warmup_tokens 2000 + decay_tokens 49 are more than the 2048 tokens of all phases",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(values, message):
    assert message in refusal(merged(BASE, values)).splitlines()


def test_a_problem_of_all_phases_is_said_once():
    values = merged(BASE, {"pretrain": {"parallel": {"data_parallel_size": 4}}})
    assert refusal(values).splitlines() == [
        "pretrain.global_batch_size 8 is not divisible by micro_batch_size 4 x data_parallel_size 4 = 16"
    ]


def test_parallel_sizes_that_fit_are_accepted():
    parallel = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 7,
        "data_parallel_size": 2,
        "expert_model_parallel_size": 4,
    }
    config = load(merged(BASE, {"pretrain": {"parallel": parallel}}), {})
    assert config.pretrain.parallel.world_size == 2 * 7 * 2
