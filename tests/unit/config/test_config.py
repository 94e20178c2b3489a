"""What the configuration accepts, and how it says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

from snaketron.config import Config, ConfigError, load, write

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
# Files of one kind of GPU stand on super.yaml: test_overlays.
OVERLAYS = sorted(
    path
    for path in [*(REPOSITORY / "config").glob("*.yaml"), *(REPOSITORY / "tests/config").glob("*.yaml")]
    if path.stem not in ("h100", "h200", "b200", "gb200")
)


def nested(path: str, value: object) -> dict:
    """`nested("sft.train_iters", 3)` is {"sft": {"train_iters": 3}}."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(base: dict, values: dict) -> dict:
    """`values` over `base`, as Snakemake merges configurations."""
    both = {
        name: merged(base[name], value) if isinstance(value, dict) and name in base else value
        for name, value in values.items()
    }
    return base | both


def refusal(values: dict, **environment: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(values, environment)
    return str(error.value)


# ------------------------------------------------------------------------------------------ the files


def test_nothing_given_is_the_defaults():
    config = load({}, {})
    assert config == Config()
    assert (config.seed, config.tracking, config.pathvars) == (
        1234,
        "off",
        {"data": "data", "ckpt": "ckpt", "hf": "hf", "eval": "eval"},
    )


def test_the_files_in_config_are_those_that_the_classes_generate():
    assert (REPOSITORY / "config/config.yaml").read_text() == write.as_yaml()
    assert (REPOSITORY / "config/schema.json").read_text() == write.as_schema()


def test_the_generated_yaml_is_the_defaults_again():
    assert load(yaml.safe_load(write.as_yaml()), {}) == Config()


def test_a_rule_that_a_description_names_exists():
    named = set(re.findall(r"-R (\w+)", write.as_yaml()))
    rules = "".join(path.read_text() for path in (REPOSITORY / "rules").glob("*.smk"))
    assert named == {"build_tokenizer"} and all(f"rule {name}:" in rules for name in named)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda p: p.name)
def test_every_overlay_that_ships_is_valid(path):
    values = yaml.safe_load(path.read_text())
    config = load(values, {})
    assert values and all(hasattr(config, section) for section in values)


# -------------------------------------------------------------------------------------- unknown, wrong


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sede": 1}, "sede: unknown key; did you mean 'seed'?"),
        ({"sft": {"train_iter": 1}}, "sft.train_iter: unknown key; did you mean 'train_iters'?"),
        (
            {"pretrain": {"optimizer": {"learning_rat": 1}}},
            "pretrain.optimizer.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        (
            {"sft": {"parallel": {"tensor_parallel_size": 1}}},
            "sft.parallel.tensor_parallel_size: unknown key; did you mean 'tensor_model_parallel_size'?",
        ),
        (
            {"corpora": [{"name": "a", "paths": ["x.jsonl"], "text_fild": "t"}]},
            "corpora[0].text_fild: unknown key; did you mean 'text_field'?",
        ),
        (
            {
                "pretrain": {
                    "phases": [
                        {"name": "a", "tokens": 1, "blend": [{"corpus": "docs", "weight": 1, "wight": 2}]}
                    ]
                }
            },
            "pretrain.phases[0].blend[0].wight: unknown key; did you mean 'weight'?",
        ),
        # Nothing is near: every key is named.
        (
            {"curation": {"minhash": {"zzz": 1}}},
            "curation.minhash.zzz: unknown key; known: hashes_per_bucket, n_grams, num_buckets",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest_one(values, message):
    assert refusal(values) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seed", "soon", "seed: input should be a valid integer"),
        ("seed", -1, "seed: input should be greater than or equal to 0 (it is -1)"),
        ("seed", 2**32, "seed: input should be less than 4294967296"),
        ("sft.train_iters", 2**60, "sft.train_iters: input should be less than or equal to 90071992547409"),
        ("model.init_method_std", 0, "model.init_method_std: input should be greater than 0"),
        ("model.moe_aux_loss_coeff", -1, "model.moe_aux_loss_coeff: input should be greater than or equal"),
        ("pathvars.data", "", "pathvars.data: string should have at least 1 character"),  # it would be /
        ("tokenizer.text", [""], "tokenizer.text[0]: string should have at least 1 character"),
        ("sft.train_iters", 0, "sft.train_iters: input should be greater than 0 (it is 0)"),
        ("sft.train_iters", 1.5, "sft.train_iters: input should be a valid integer"),
        (
            "pretrain_data.valid_fraction",
            1,
            "pretrain_data.valid_fraction: input should be less than 1 (it is 1)",
        ),
        ("model.hybrid_layer_pattern", "MAMBA", "model.hybrid_layer_pattern: string should match pattern"),
        (
            "model.precision",
            "fp16",
            "model.precision: input should be 'fp32', 'bf16', 'fp8_delayed', ",
        ),
        ("tokenizer.text", "a.jsonl", "tokenizer.text: input should be a valid list (it is 'a.jsonl')"),
        ("sft", None, "sft: input should be a valid dictionary or instance of Sft (it is None)"),
        ("sft.micro_batch_size", 2, "sft.micro_batch_size: input should be 1 (it is 2)"),
        ("tracking_upload", ["model-sft"], "tracking_upload[0]: input should be 'raw-data', 'tokenizer', "),
        ("tracking", True, "tracking: input should be 'off', 'offline' or 'online' (it is True)"),
        (
            "pathvars.dta",
            "x",
            "pathvars.dta.[key]: input should be 'data', 'ckpt', 'hf', 'eval', 'logs' or 'benchmarks'",
        ),
        (
            "pathvars.data",
            "a{b}",
            "pathvars.data: 'a{b}' holds a brace, which Snakemake takes for a wildcard",
        ),
        ("pathvars.data", "/dev/null/x", "pathvars.data: '/dev/null/x' cannot be made, because '/dev/null'"),
        ("pathvars", {"data": "all", "ckpt": "./all"}, "pathvars.ckpt: is './all' like pathvars.data; both"),
        (
            "pathvars.logs",
            "<ckpt>/logs",
            "pathvars.logs: '<ckpt>/logs' holds <ckpt>, which Snakemake takes for",
        ),
        (
            "pathvars.ckpt",
            "-x",
            "pathvars.ckpt: '-x' starts with a dash, as the options of programs do; give",
        ),
        ("tokenizer.text", ["a", "b\n"], "tokenizer.text[1]: 'b\\n' holds a line break or another control"),
        (
            "tokenizer.path",
            "--help",
            "tokenizer.path: '--help' starts with a dash, as the options of programs",
        ),
        ("curation.evaluation", ["{}"], "curation.evaluation[0]: '{}' holds a brace"),
        ("sources_lock", "a\udcff", "the configuration holds text that is not UTF-8: 'a\\udcff'"),
        ("corpora", [], "pretrain.phases[0].blend[0].corpus: 'docs' is not defined; known: none"),
        ("pretrain.phases", [], "pretrain.phases: list should have at least 1 item"),
        (
            "sft.optimizer.learning_rate",
            float("inf"),
            "sft.optimizer.learning_rate: input should be a finite",
        ),
        ("sft.optimizer.weight_decay", float("nan"), "sft.optimizer.weight_decay: input should be"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path, value, message):
    assert message in refusal(nested(path, value))


def test_a_name_that_is_no_directory_name_is_refused():
    found = refusal({"corpora": [{"name": "My Docs", "paths": ["x.jsonl"]}]})
    assert found.startswith("corpora[0].name: string should match pattern") and "'My Docs'" in found


def test_a_missing_key_of_a_list_item_is_named():
    assert refusal({"corpora": [{"paths": ["a.jsonl"]}]}) == "corpora[0].name: missing"


BLEND = {"pretrain": {"phases": [{"name": "p", "tokens": 10**6, "blend": [{"corpus": "a", "weight": 1}]}]}}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({}, "corpora[0] (a): give one of paths, hub and tokens"),
        ({"paths": ["x"], "hub": {"repository": "o/n"}}, "corpora[0] (a): give one of paths, hub and tokens"),
        (
            {"paths": ["x"], "metadata_fields": ["url", "row"]},
            "corpora[0].metadata_fields: 'row' is the name of a column of ours; leave it out",
        ),
        (
            {"paths": ["x"], "curation": {"decontaminate": True}},
            "corpora[0].curation.decontaminate: name the texts to protect in curation.evaluation",
        ),
        (
            {
                "paths": ["x"],
                "curation": {"filters": [{"name": "gopher_quality", "options": {"min_words": 5}}]},
            },
            "corpora[0].curation.filters[0].options.min_words: unknown option of gopher_quality; "
            "did you mean 'min_doc_words'?",
        ),
        (
            {"paths": ["x"], "curation": {"filters": [{"name": "regex"}]}},
            "corpora[0].curation.filters[0].options.pattern: regex needs it",
        ),
        (
            {"paths": ["x"], "curation": {"filters": [{"name": "regex", "options": {"pattern": "a("}}]}},
            "corpora[0].curation.filters[0].options.pattern: not a regular expression "
            "(missing ), unterminated subpattern at position 1)",
        ),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(corpus, message):
    assert refusal({"corpora": [{"name": "a", **corpus}], **BLEND}) == message


def test_every_problem_has_its_line():
    values = {"sede": 1, "sft": {"train_iters": 0}}
    assert sorted(line.partition(":")[0] for line in refusal(values).splitlines()) == [
        "sede",
        "sft.train_iters",
    ]


def test_a_bare_off_in_yaml_is_off():
    assert load(yaml.safe_load("tracking: off"), {}).tracking == "off"


def test_a_date_where_text_is_wanted_is_named():
    found = refusal(yaml.safe_load("corpora: [{name: 2026-01-01, paths: [x.jsonl]}]"))
    assert found.startswith("corpora[0].name: ") and "2026-01-01" in found


# ----------------------------------------------------------------------------------------- cross-checks

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
        (  # 2 x 1 x 1 x 2 processes, of which a pipeline stage has 2
            {
                "sft": {
                    "parallel": {
                        "pipeline_model_parallel_size": 2,
                        "data_parallel_size": 2,
                        "expert_model_parallel_size": 4,
                    }
                }
            },
            "the processes of a pipeline stage (sft) 2 is not divisible by "
            "expert_model_parallel_size x expert_tensor_parallel_size 4",
        ),
        (
            {"pretrain": {"parallel": {"pipeline_model_parallel_size": 8}}},
            "the layers of model.hybrid_layer_pattern 7 is not divisible by "
            "pretrain.parallel.pipeline_model_parallel_size 8",
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


# ------------------------------------------------------------------------------------------ environment


def test_the_environment_is_over_every_file():
    environment = {"SNAKETRON_SFT__TRAIN_ITERS": "11", "SNAKETRON_TRACKING": "off", "HOME": "/root"}
    config = load({"sft": {"train_iters": 50, "num_samples": 3}}, environment)
    assert (config.sft.train_iters, config.sft.num_samples, config.tracking) == (11, 3, "off")


def test_the_environment_can_give_a_list():
    blend = "[{source: tools, weight: 2}]"
    config = load({}, {"SNAKETRON_SFT__BLEND": blend})
    assert [(s.source, s.weight) for s in config.sft.blend] == [("tools", 2.0)]


def test_the_variable_that_asks_for_plain_lines_is_no_key():
    assert load({}, {"SNAKETRON_PLAIN": "1"}) == load({}, {})


def test_the_environment_does_not_change_what_was_given():
    values = {"sft": {"train_iters": 50}}
    load(values, {"SNAKETRON_SFT__TRAIN_ITERS": "11"})
    assert values == {"sft": {"train_iters": 50}}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SNAKETRON_SFT__TRAIN_ITER", "1", "sft.train_iter: unknown key; did you mean 'train_iters'?"),
        ("SNAKETRON_STF__TRAIN_ITERS", "1", "stf: unknown key; did you mean 'sft'?"),
        (
            "SNAKETRON_SEED__X",
            "1",
            "environment variable SNAKETRON_SEED__X: 'seed' is not a section",
        ),
        ("SNAKETRON_SFT__TRAIN_ITERS", "many", "sft.train_iters: input should be a valid integer"),
        ("SNAKETRON_SEED", "[1", "environment variable SNAKETRON_SEED: '[1' is not YAML"),
    ],
)
def test_a_wrong_variable_is_named(name, value, message):
    assert message in refusal({"seed": 1}, **{name: value})
