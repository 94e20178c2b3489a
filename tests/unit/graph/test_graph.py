"""What the rules ask of the configuration."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from types import SimpleNamespace

from snaketron.config import ConfigError, load
from snaketron.graph.graph import Graph
from snaketron.graph.unknown import find

import pytest

VALUES = {
    "corpora": [
        {"name": "web", "paths": ["raw/web"], "text_field": "body"},
        {"name": "code", "paths": ["raw/code.jsonl"]},
        {"name": "spare", "paths": ["raw/code.jsonl"]},
    ],
    "chats": [
        {"name": "help", "paths": ["raw/help.jsonl"], "messages_field": "turns", "tools_field": "functions"},
        {"name": "spare", "paths": ["raw/help.jsonl"]},
    ],
    "tokenizer": {"text": ["raw/code.jsonl"], "vocab_size": 500, "text_field": "the body"},
    "pretrain": {
        "phases": [
            {
                "name": "one",
                "tokens": 300_000,
                "blend": [{"corpus": "web", "weight": 0.75}, {"corpus": "code", "weight": 2}],
            },
            {"name": "two", "tokens": 100_000, "blend": [{"corpus": "web", "weight": 1}]},
            {"name": "three", "tokens": 100_000, "blend": [{"corpus": "code", "weight": 1}]},
        ]
    },
    "sft": {"blend": [{"source": "help", "weight": 3}]},
}


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("web/b.jsonl", "web/a.parquet", "code.jsonl", "help.jsonl"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def graph(**changes) -> Graph:
    return Graph(load(VALUES | changes, {}))


def job(**wildcards: str) -> SimpleNamespace:
    return SimpleNamespace(**wildcards)


def test_a_shard_leads_to_its_raw_file():
    assert graph().raw_text(job(corpus="web", shard="a")) == ["raw/web/a.parquet"]
    assert graph().raw_chats(job(source="help", shard="help")) == ["raw/help.jsonl"]


def test_what_curation_left_is_tokenized():
    corpora = [*VALUES["corpora"][1:], {"name": "web", "paths": ["raw/web"], "curation": {"pii": True}}]
    made = graph(corpora=corpora)
    assert made.text_to_tokenize(job(corpus="web", shard="a")) == ["<data>/curated/web/a.parquet"]
    assert made.text_to_tokenize(job(corpus="code", shard="code")) == ["raw/code.jsonl"]


def test_all_shards_of_a_source_can_be_packed_together():
    Path("raw/more.jsonl").touch()
    chats = [{"name": "help", "paths": ["raw/help.jsonl", "raw/more.jsonl"]}]
    alone, together = (graph(chats=chats, sft_data={"pack_across_shards": a}) for a in (False, True))
    pattern = "<data>/sft/{source}/{shard}.json"
    assert alone.sft_shards(pattern) == ["<data>/sft/help/help.json", "<data>/sft/help/more.json"]
    assert alone.rendered_chats(job(source="help", shard="more")) == ["<data>/chat/help/more.parquet"]
    assert together.sft_shards(pattern) == ["<data>/sft/help/all.json"]
    assert together.rendered_chats(job(source="help", shard="all")) == [
        "<data>/chat/help/help.parquet",
        "<data>/chat/help/more.parquet",
    ]


def test_a_phase_needs_the_shards_of_its_corpora_alone():
    pattern = graph().phase_shards("<data>/tokens/{corpus}/train/{shard}.bin")
    assert pattern(job(phase="one")) == [
        "<data>/tokens/web/train/a.bin",
        "<data>/tokens/web/train/b.bin",
        "<data>/tokens/code/train/code.bin",
    ]
    assert pattern(job(phase="three")) == ["<data>/tokens/code/train/code.bin"]


def test_sft_needs_the_shards_of_its_sources_alone():
    assert graph().sft_shards("<data>/sft/{source}/{shard}.json") == ["<data>/sft/help/help.json"]


def test_weights_are_given_as_shares():
    """0.75 and 2 of a phase, as 3 and 8 would be; and 3 of all."""
    assert json.loads(graph().phase_settings(job(phase="one")))["weights"] == {"web": 3 / 11, "code": 8 / 11}
    assert json.loads(graph().blend_settings())["weights"] == {"help": 1.0}


def test_fields_are_those_of_the_source():
    texts = [json.loads(graph().tokenize_settings(job(corpus=c))) for c in ("web", "code")]
    assert [settings["text_field"] for settings in texts] == ["body", "text"]
    chats = json.loads(graph().render_settings(job(source="help")))
    assert (chats["messages_field"], chats["tools_field"]) == ("turns", "functions")


def test_a_source_is_rendered_as_it_says_and_else_as_all():
    shared = {"template_arguments": {"a": 1, "b": 1}, "reasoning": {"stripped": 0.1}, "bad_rows": "drop"}
    own = {"template_arguments": {"b": 2}, "reasoning": {}, "chat_template": "t.jinja", "sequences": "turn"}
    made = graph(sft_data=shared, chats=[VALUES["chats"][0] | own, VALUES["chats"][1]])
    first, second = (json.loads(made.render_settings(job(source=name))) for name in ("help", "spare"))
    assert first["template_arguments"] == {"a": 1, "b": 2} and first["sequences"] == "turn"
    assert second["template_arguments"] == {"a": 1, "b": 1} and second["sequences"] == "conversation"
    assert (first["reasoning"]["stripped"], first["seed"]) == (0.0, None)  # it chooses nothing
    assert (second["reasoning"]["stripped"], second["seed"]) == (0.1, 1234)
    assert first["bad_rows"] == second["bad_rows"] == "drop"
    assert made.source_template(job(source="help", shard="a")) == "t.jinja"
    assert made.source_template(job(source="spare")) == "<data>/tokenizer/chat_template.jinja"


def test_a_corpus_is_read_once_by_its_own_settings():
    """The filter and the limit are applied before curation; the policies hold for what it leaves as well."""
    corpus = {"name": "web", "paths": ["raw/web"], "text_field": "body", "where": {"lang": ["en"]}}
    for curation, expected in ((None, ("body", {"lang": ["en"]})), ({"pii": True}, ("text", {}))):
        made = graph(
            corpora=[*VALUES["corpora"][1:], {**corpus, "curation": curation}],
            pretrain_data={"bad_rows": "drop", "max_line_bytes": 99_000_000},
        )
        settings = json.loads(made.tokenize_settings(job(corpus="web")))
        assert (settings["text_field"], settings["where"]) == expected
        assert (settings["bad_rows"], settings["max_line_bytes"]) == ("drop", 99_000_000)
        assert json.loads(made.curation.filter_settings(job(corpus="web")))["where"] == {"lang": ["en"]}


def test_the_seed_reaches_the_packs_only_where_it_matters():
    how = {"pack_size": 1024, "padding_multiple": 1, "long_conversations": "drop"}
    assert json.loads(graph(seed=7).pack_settings()) == how | {"algorithm": "first_fit_decreasing"}
    shuffled = json.loads(graph(seed=7, sft_data={"algorithm": "first_fit_shuffle"}).pack_settings())
    assert shuffled == how | {"algorithm": "first_fit_shuffle", "seed": 7}


def test_a_phase_orders_its_text_by_its_own_seed_or_by_that_of_all():
    one, two, _ = VALUES["pretrain"]["phases"]
    made = graph(seed=7, pretrain={"phases": [one | {"seed": 0}, two]})
    seeds = (json.loads(made.index_settings(job(phase=name)))["seed"] for name in ("one", "two"))
    assert list(seeds) == [0, 7]
    # The training is told the same, or it would refuse the index; its weights are those of `seed`.
    one_told, two_told = (
        json.loads(made.training.settings("pretrain")(job(phase=name))) for name in ("one", "two")
    )
    assert (one_told["seed"], one_told["data_seed"]) == (7, 0)
    assert two_told["seed"] == 7 and "data_seed" not in two_told


def test_packs_leave_the_room_that_the_trainings_on_them_need():
    """Context parallelism gives each process two chunks of a conversation; other sizes need no room."""
    tensor, context = {"tensor_model_parallel_size": 2}, {"context_parallel_size": 4}
    sft = VALUES["sft"]
    for keys, multiple in (
        ({"sft": sft | {"parallel": tensor | context}}, 8),
        ({"sft": sft | {"parallel": tensor}}, 1),
        ({"sft_data": {"padding_multiple": 32}}, 32),
    ):
        assert json.loads(graph(**keys).pack_settings())["padding_multiple"] == multiple


def test_a_tokenizer_is_trained_on_its_text():
    assert graph().tokenizer_text(job()) == ["raw/code.jsonl"]
    assert json.loads(graph().tokenizer_settings(job())) == {
        "path": None,
        "vocab_size": 500,
        "text_field": "the body",
    }
    assert graph().chat_template(job()) == ["config/chat_template.jinja"]
    template = {"chat_template": "config/chat_template.jinja", "path": None}
    assert json.loads(graph().template_settings(job())) == template


def test_a_tokenizer_that_is_taken_needs_no_text():
    taken = graph(tokenizer={"path": "my tokenizers/x", "chat_template": None})
    assert taken.tokenizer_text(job()) == taken.chat_template(job()) == []
    settings = {"path": "my tokenizers/x", "vocab_size": None, "text_field": None}
    assert json.loads(taken.tokenizer_settings(job())) == settings
    template = {"chat_template": None, "path": "my tokenizers/x"}
    assert json.loads(taken.template_settings(job())) == template


def test_all_missing_raw_files_are_named_with_their_paths_in_the_configuration():
    Path("raw/help.jsonl").unlink()
    Path("raw/code.jsonl").unlink()
    start = f"(relative paths start at {Path.cwd()})"
    with pytest.raises(ConfigError) as error:
        graph()
    assert str(error.value).splitlines() == [
        f"{key}.paths[0]: raw/{name}.jsonl does not exist {start}"
        for key, name in (
            ("corpora[1]", "code"),
            ("corpora[2]", "code"),
            ("chats[0]", "help"),
            ("chats[1]", "help"),
        )
    ]


def test_all_files_that_the_user_named_are_known():
    made = graph(pathvars={"data": "my data"})
    assert {"my data", "raw/web/a.parquet", "raw/help.jsonl", "config/chat_template.jinja"} <= set(
        made.paths()
    )


@pytest.mark.parametrize(
    ("ask", "wildcards", "said"),
    [
        ("phase_shards", {"phase": "foo"}, "no phase of pretraining is called 'foo'. Known: one, three, two"),
        ("training.previous_phase", {"phase": "tow"}, "'tow'; did you mean 'two'? Known: one, three, two"),
        (
            "raw_text",
            {"corpus": "web", "shard": "x.y"},
            "no shard of corpus web is called 'x.y'. Known: a, b",
        ),
        (
            "raw_text",
            {"corpus": "books", "shard": "a"},
            "no corpus is called 'books'. Known: code, spare, web",
        ),
        ("raw_chats", {"source": "hlp", "shard": "a"}, "no source of conversations is called 'hlp'; did you"),
        (
            "rendered_chats",
            {"source": "help", "shard": "all"},
            "no packed shard of source help is called 'all'",
        ),
        ("bases.files", {"base": "foo"}, "no base is called 'foo'."),
        ("curation.shards", {"group": "all"}, "no group of exact_dedup is called 'all'."),
    ],
)
def test_a_target_of_an_unknown_name_is_told_the_known_ones(ask: str, wildcards: dict[str, str], said: str):
    function = operator.attrgetter(ask)(graph())
    pattern = "{corpus}/{shard}"
    if ask in ("phase_shards", "curation.shards"):  # they make the input function
        function = function(pattern) if ask == "phase_shards" else function("exact_dedup", pattern)
    with pytest.raises(ConfigError) as error:
        function(job(**wildcards))
    assert said in str(error.value)


def test_of_many_known_names_the_first_are_listed():
    with pytest.raises(ConfigError, match=r"Known: 0, 1, 10, 11, 12, 13, 14, 15, 16, 17 and 90 more$"):
        find("shard", "x", dict.fromkeys(map(str, range(100))))


def test_the_index_of_a_long_phase_asks_for_the_memory_and_the_time_that_it_takes():
    """2.44 G samples of 18 bytes and 1 GB; 4,000 shards compared for each: 3 hours and half as much again."""
    assert graph().index_resources() == {}  # the profile's for data jobs will do
    long = VALUES["pretrain"]["phases"][0] | {"tokens": 20_000_000_000_000}
    sizes = {"seq_length": 8192, "global_batch_size": 3072, "phases": [long, VALUES["pretrain"]["phases"][1]]}
    made = graph(pretrain=sizes)
    made.text["web"] = {str(number): ["raw/web/b.jsonl"] for number in range(3_999)}
    asked = made.index_resources()
    assert asked["mem_mb"](job(phase="one"), attempt=1) == 44_946
    assert asked["mem_mb"](job(phase="two"), attempt=2) == 8_000
    seconds = 794_729 * 3072 * (60 + 4_000 + 8192 * 0.06) * 1e-9
    assert asked["runtime"](job(phase="one")) == math.ceil(10 + 1.5 * seconds / 60) == 288
    assert asked["runtime"](job(phase="two")) == 60


def test_how_long_a_job_reads_follows_from_the_sizes_of_its_files(tmp_path: Path):
    """Half of what was measured: 60 MB of text a second, 2.5 MB of conversations; Parquet holds thrice."""
    for name, size in (("web/a.parquet", 40_000_000), ("web/b.jsonl", 60_000_000), ("help.jsonl", 5_000_000)):
        with (tmp_path / "raw" / name).open("wb") as file:
            file.truncate(size)

    corpora = [*VALUES["corpora"], {"name": "help", "paths": ["raw/web"]}]  # which may have the name of chats

    def seconds(rule: str, **wildcards: str) -> float:
        asking = SimpleNamespace(rule=SimpleNamespace(name=rule), wildcards=wildcards)
        return graph(corpora=corpora).seconds(asking)

    assert seconds("tokenize_shard", corpus="web", shard="a") == 2.0
    assert seconds("tokenize_shard", corpus="web", shard="b") == 1.0
    assert seconds("tokenize_shard", corpus="help", shard="a") == 2.0
    assert seconds("render_chat", source="help", shard="help") == 2.0
    assert seconds("blend_pretrain", phase="one") == seconds("pack_sft", source="help", shard="help") == 0
