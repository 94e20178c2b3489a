"""The reason for a changed parameter names the keys of the configuration, with their values."""

from __future__ import annotations

from typing import Any

from snaketron.config import Config, load
from snaketron.graph.snakemake.reasons import changes, is_check
from snaketron.settings.blends import BlendSettings, phase_settings
from snaketron.settings.chats import pack_settings, render_settings
from snaketron.settings.curation import filter_settings
from snaketron.settings.evaluation import eval_settings
from snaketron.settings.text import tokenize_settings
from snaketron.settings.tokenizer import template_settings, tokenizer_settings
from snaketron.settings.training import train_settings

import pytest

BASE: dict[str, Any] = {"tokenizer": {"vocab_size": 2048}}
OPTIMIZER = {"min_learning_rate": 1e-4, "weight_decay": 0.0}  # as in config.yaml
PHASES = [
    {"name": "broad", "tokens": 12288, "blend": [{"corpus": "docs", "weight": 1}]},
    {"name": "focused", "tokens": 8192, "blend": [{"corpus": "docs", "weight": 1}]},
]


def with_keys(**keys: Any) -> Config:
    return load(BASE | keys, {})


def of_training(name: str, before: Config, now: Config) -> list[str]:
    section, _, phase = name.partition("/")
    old, new = (repr(train_settings(config, name).model_dump_json()) for config in (before, now))
    return changes(now, section, {"phase": phase} if phase else {}, [old], [new], {new: "settings"})


def test_a_changed_key_is_named_as_in_the_configuration():
    """The schedule ends with the steps, so its end is not told."""
    before, now = with_keys(sft={"train_iters": 30}), with_keys(sft={"train_iters": 60})
    assert of_training("sft", before, now) == ["sft.train_iters: 30 -> 60"]


@pytest.mark.parametrize(
    ("name", "before", "now", "expected"),
    [
        ("sft", {}, {"seed": 5}, ["seed: 1234 -> 5"]),
        ("sft", {}, {"sft_data": {"pack_size": 768}}, ["sft_data.pack_size: 1024 -> 768"]),
        (
            "sft",
            {},
            {"sft": {"optimizer": OPTIMIZER | {"learning_rate": 0.5}, "warmup_iters": 7}},
            ["sft.optimizer.learning_rate: 0.003 -> 0.5", "sft.warmup_iters: 10 -> 7"],
        ),
        ("pretrain/broad", {}, {"model": {"moe_router_topk": 3}}, ["model.moe_router_topk: 2 -> 3"]),
        ("lora", {}, {"lora": {"rank": 4}}, ["lora.rank: 64 -> 4"]),
        (
            "pretrain/broad",
            {"pretrain": {"phases": PHASES, "warmup_tokens": 1024, "decay_tokens": 0}},
            {"pretrain": {"phases": PHASES, "warmup_tokens": 2048, "decay_tokens": 0}},
            ["pretrain.warmup_tokens: 1024 -> 2048"],
        ),
        (
            "pretrain/focused",
            {"pretrain": {"phases": PHASES}},
            {"pretrain": {"phases": [PHASES[0], PHASES[1] | {"seed": 5}]}},
            ["pretrain.phases[1].seed: 1234 -> 5"],
        ),
        (
            "pretrain/focused",
            {"pretrain": {"phases": PHASES, "warmup_tokens": 1024, "decay_tokens": 0}},
            {
                "pretrain": {
                    "phases": [PHASES[0], PHASES[1] | {"tokens": 16384}],
                    "warmup_tokens": 1024,
                    "decay_tokens": 0,
                }
            },
            ["pretrain.phases[1].tokens (steps): 8 -> 16"],
        ),
        (
            "pretrain/focused",
            {"pretrain": {"phases": PHASES, "warmup_tokens": 1024, "decay_tokens": 0}},
            {
                "pretrain": {
                    "phases": [PHASES[0] | {"tokens": 16384}, PHASES[1]],
                    "warmup_tokens": 1024,
                    "decay_tokens": 0,
                }
            },
            [
                "pretrain.phases (schedule.start): 12288 -> 16384",
                "pretrain.phases (schedule.end): 20480 -> 24576",
            ],
        ),
    ],
)
def test_keys_of_trainings(name: str, before: dict, now: dict, expected: list[str]):
    assert of_training(name, with_keys(**before), with_keys(**now)) == expected


def test_keys_of_text_are_those_of_the_corpus_or_of_all_text():
    before = with_keys()
    now = with_keys(pretrain_data={"document_order": "shuffled"})
    old, new = (
        repr(tokenize_settings(config, config.corpora[1]).model_dump_json()) for config in (before, now)
    )
    wildcards = {"corpus": before.corpora[1].name, "shard": "part_0"}
    assert changes(now, "tokenize_shard", wildcards, [old], [new], {new: "settings"}) == [
        "pretrain_data.document_order: kept -> shuffled",
        "seed: null -> 1234",
    ]
    corpora = [corpus.model_dump() for corpus in before.corpora]
    corpora[1]["max_tokens"] = 1000
    now = with_keys(corpora=corpora)
    new = repr(tokenize_settings(now, now.corpora[1]).model_dump_json())
    assert changes(now, "tokenize_shard", wildcards, [old], [new], {new: "settings"}) == [
        "corpora[1].max_tokens: null -> 1000"
    ]


def test_keys_of_the_tokenizer():
    """A trained one has a size and a field of its text, one that is taken has a directory."""
    before, now = with_keys(), with_keys(tokenizer={"path": "their/one", "chat_template": None})
    old, new = (repr(tokenizer_settings(config, "their/one").model_dump_json()) for config in (before, now))
    assert changes(now, "build_tokenizer", {}, [old], [new], {new: "settings"}) == [
        "tokenizer.path: null -> their/one",
        "tokenizer.vocab_size: 2048 -> null",
        "tokenizer.text_field: text -> null",
    ]
    old, new = (repr(template_settings(config, "their/one").model_dump_json()) for config in (before, now))
    assert changes(now, "install_chat_template", {}, [old], [new], {new: "settings"}) == [
        "tokenizer.chat_template: config/chat_template.jinja -> null",
        "tokenizer.path: null -> their/one",
    ]


def test_the_option_of_a_filter_that_changed_is_told_alone():
    """The whole list was told and cut off before what differs."""

    def of(*filters: dict[str, Any]) -> Config:
        curation = {"filters": list(filters)}
        corpora = [{"name": "docs", "paths": ["a.jsonl"], "curation": curation}]
        return with_keys(corpora=corpora, pretrain={"phases": PHASES})

    first = {"name": "gopher_quality", "options": {"min_doc_words": 20, "max_doc_words": 9000}}
    words = {"name": "gopher_quality", "options": {"min_doc_words": 25, "max_doc_words": 9000}}
    more = {"name": "regex", "options": {"pattern": "SECRET"}}

    def told(before: Config, now: Config) -> list[str]:
        old, new = (repr(filter_settings(one, one.corpora[0]).model_dump_json()) for one in (before, now))
        return changes(now, "filter_shard", {"corpus": "docs"}, [old], [new], {new: "settings"})

    where = "corpora[0].curation.filters"
    assert told(of(first), of(words)) == [f"{where}[0].options.min_doc_words: 20 -> 25"]
    assert told(of(first), of(first, more)) == [
        f"{where}[1].name: nothing -> regex",
        f"{where}[1].options.pattern: nothing -> SECRET",
    ]
    assert told(of(first, more), of(first)) == [
        f"{where}[1].name: regex -> nothing",
        f"{where}[1].options.pattern: SECRET -> nothing",
    ]


def test_keys_of_evaluations():
    before, now = with_keys(), with_keys(eval={"answers": 4})
    old, new = (repr(eval_settings(config, "sft", {}).model_dump_json()) for config in (before, now))
    assert changes(now, "evaluate", {"stage": "sft"}, [old], [new], {new: "settings"}) == [
        "eval.answers: 32 -> 4"
    ]


def test_keys_of_chats():
    before, now = with_keys(), with_keys(sft_data={"reasoning": {"stripped": 0.5}})
    old, new = (repr(render_settings(config, config.chats[0]).model_dump_json()) for config in (before, now))
    found = changes(now, "render_chat", {"source": before.chats[0].name}, [old], [new], {new: "settings"})
    assert found == ["sft_data.reasoning.stripped: 0.0 -> 0.5", "seed: null -> 1234"]


@pytest.mark.parametrize("given", ["sft_data", "chats[0]"])
def test_an_argument_of_templates_is_told_where_it_is_given_and_alone(given: str):
    """Those that a source or all got are told alone: the empty ones of before are no change."""
    source = {"name": "docs", "paths": ["docs.jsonl"]}
    blend = {"sft": {"blend": [{"source": "docs", "weight": 1}]}}
    argument = {"template_arguments": {"enable_thinking": True}}
    before = with_keys(**blend, chats=[source])
    now = with_keys(
        **blend,
        chats=[source | argument if given == "chats[0]" else source],
        sft_data=argument if given == "sft_data" else {},
    )
    old, new = (repr(render_settings(config, config.chats[0]).model_dump_json()) for config in (before, now))
    found = changes(now, "render_chat", {"source": "docs"}, [old], [new], {new: "settings"})
    assert found == [f"{given}.template_arguments.enable_thinking: nothing -> true"]
    back = changes(before, "render_chat", {"source": "docs"}, [new], [old], {old: "settings"})
    assert back == ["chats[0].template_arguments.enable_thinking: true -> nothing"]  # the nearest


def test_a_key_that_is_left_out_where_it_has_its_default_had_its_default():
    """Settings do not have the date, the tags and the names of roles of before."""
    keys = {"roles": {"human": "user"}, "thinking_tags": None}
    source = {"name": "docs", "paths": ["docs.jsonl"]}
    blend = {"sft": {"blend": [{"source": "docs", "weight": 1}]}}
    before = with_keys(**blend, chats=[source])
    now = with_keys(**blend, chats=[source | keys], sft_data={"template_date": "2026-11-30"})
    old, new = (repr(render_settings(config, config.chats[0]).model_dump_json()) for config in (before, now))
    assert changes(now, "render_chat", {"source": "docs"}, [old], [new], {new: "settings"}) == [
        "chats[0].roles.human: nothing -> user",
        'chats[0].thinking_tags: ["<think>", "</think>"] -> null',
        "sft_data.template_date: 2026-01-01 -> 2026-11-30",
    ]
    before, now = with_keys(), with_keys(sft_data={"algorithm": "first_fit_shuffle"})
    old, new = (repr(pack_settings(config).model_dump_json()) for config in (before, now))
    assert changes(now, "pack_sft", {}, [old], [new], {}) == [
        "sft_data.algorithm: first_fit_decreasing -> first_fit_shuffle",
        "seed: null -> 1234",
    ]


def test_the_split_of_a_source_is_told_alone():
    """The fractions that it has no use for follow from it. A blend is told, too."""
    docs, mine = ({"name": name, "paths": [f"{name}.jsonl"]} for name in ("docs", "mine"))
    blend = [*PHASES[0]["blend"], {"corpus": "mine", "weight": 1}]
    pretrain = {"phases": [PHASES[0] | {"blend": blend}], "warmup_tokens": 0, "decay_tokens": 0}
    before, now = (
        with_keys(corpora=[docs, mine | split], pretrain=pretrain) for split in ({}, {"split": "valid"})
    )
    old, new = (repr(tokenize_settings(c, c.corpora[-1]).model_dump_json()) for c in (before, now))
    told = changes(now, "tokenize_shard", {"corpus": "mine"}, [old], [new], {new: "settings"})
    assert told == ["corpora[1].split: null -> valid"]
    back = changes(before, "tokenize_shard", {"corpus": "mine"}, [new], [old], {old: "settings"})
    assert back == ["corpora[1].split: valid -> null"]
    old, new = (repr(phase_settings(c, "broad").model_dump_json()) for c in (before, now))
    assert changes(now, "blend_pretrain", {"phase": "broad"}, [old], [new], {new: "settings"}) == [
        "pretrain.phases[0].blend (docs): 0.5 -> 1.0",
        "pretrain.phases[0].blend (mine): 0.5 -> 1.0",
        "corpora[1].split: nothing -> valid",
    ]


def test_keys_of_packs():
    before, now = with_keys(sft_data={"pack_size": 512}), with_keys(sft_data={"pack_size": 768})
    old, new = (repr(pack_settings(config).model_dump_json()) for config in (before, now))
    assert changes(now, "pack_sft", {}, [old], [new], {}) == ["sft_data.pack_size: 512 -> 768"]


def test_a_key_that_is_null_again_is_named_where_it_stands():
    before, now = with_keys(sft_data={"padding_multiple": 8}), with_keys()
    old, new = (repr(pack_settings(config).model_dump_json()) for config in (before, now))
    assert changes(now, "pack_sft", {}, [old], [new], {}) == ["sft_data.padding_multiple: 8 -> 1"]


def test_weights_of_a_blend_are_told_one_by_one():
    config = with_keys()
    old, new = (
        repr(BlendSettings(weights=weights).model_dump_json())
        for weights in ({"docs": 0.6, "code": 0.4}, {"docs": 1.0})
    )
    assert changes(config, "blend_sft", {}, [old], [new], {new: "settings"}) == [
        "sft.blend (docs): 0.6 -> 1.0",
        "sft.blend (code): 0.4 -> nothing",
    ]


def test_tokens_and_weights_of_a_phase_are_those_of_its_entry():
    """Weights are told as the shares that they are."""
    blend = [{"corpus": "docs", "weight": 1}, {"corpus": "code", "weight": 3}]
    later = {"name": "focused", "tokens": 16384, "blend": blend}
    before, now = (with_keys(pretrain={"phases": [PHASES[0], one]}) for one in (PHASES[1], later))
    old, new = (repr(phase_settings(config, "focused").model_dump_json()) for config in (before, now))
    assert changes(now, "blend_pretrain", {"phase": "focused"}, [old], [new], {new: "settings"}) == [
        "pretrain.phases[1].blend (docs): 1.0 -> 0.25",
        "pretrain.phases[1].blend (code): nothing -> 0.75",
        "pretrain.phases[1].tokens: 8192 -> 16384",
    ]


def test_a_parameter_that_is_new_or_gone_is_told():
    config = with_keys()
    assert changes(config, "download", {}, [], ["5"], {"5": "size"}) == ["size: nothing -> 5"]
    long = changes(config, "download", {}, ["'a'"], [repr("b" * 100)], {})
    assert long == [f"download: a -> {'b' * 60}..."]


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, [True]), ({"bad_rows": "drop"}, [False, True])],  # in the order of the keys
)
def test_a_limit_on_dropped_conversations_is_no_reason_by_itself(more: dict[str, Any], expected: list[bool]):
    """What is rendered has kept the limit of before, and does not depend on it."""
    before, now = with_keys(), with_keys(sft_data={"max_dropped_fraction": 0.2, **more})
    old, new = (repr(render_settings(c, c.chats[0]).model_dump_json()) for c in (before, now))
    lines = changes(now, "render_chat", {"source": now.chats[0].name}, [old], [new], {new: "settings"})
    assert list(map(is_check, lines)) == expected
