"""Keys and values that the configuration does not know, and how it says so."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from tests.unit.config.refusals import nested, refusal

import pytest
import yaml


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
        # The name is that of a key elsewhere: of the nearest such section.
        (
            {"sft": {"learning_rate": 0.1}},
            "sft.learning_rate: unknown key; did you mean sft.optimizer.learning_rate?",
        ),
        (
            {"pretrain": {"tensor_model_parallel_size": 2}},
            "pretrain.tensor_model_parallel_size: unknown key; "
            "did you mean pretrain.parallel.tensor_model_parallel_size?",
        ),
        ({"sft": {"pack_size": 9}}, "sft.pack_size: unknown key; did you mean sft_data.pack_size?"),
        (
            {"sft_data": {"sequences": "turn"}},
            "sft_data.sequences: unknown key; did you mean chats[0].sequences?",
        ),
        (
            {"pretrain": {"train_iters": 9}},
            "pretrain.train_iters: unknown key; did you mean sft.train_iters or lora.train_iters?",
        ),
        ({"corpora": [{"name": "a", "path": "x"}]}, "corpora[0].path: unknown key; did you mean 'paths'?"),
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
        ("sft", None, "sft: holds no key; leave it out"),
        (
            "sft",
            "{train_iters: 9",
            "sft: input should be keys with values, such as {base: ...} (it is '{train",
        ),
        ("sft.optimizer", 0.1, "sft.optimizer: input should be keys with values, such as {"),
        ("corpora", ["docs"], "corpora[0]: input should be keys with values, such as {"),
        # Only with a point YAML reads 1.0e6 as a number; of a whole number the digits are told.
        ("sft.train_iters", "2e3", "sft.train_iters: to YAML this is text; write 2_000 (it is '2e3')"),
        ("sft.train_iters", "2.5e0", "sft.train_iters: input should be a valid integer, unable to parse"),
        ("sft.train_iters", "inf", "sft.train_iters: input should be a valid integer, unable to parse"),
        ("sft.micro_batch_size", 2, "sft.micro_batch_size: input should be 1 (it is 2)"),
        ("tracking_upload", ["model-sft"], "tracking_upload[0]: input should be 'raw-data', 'tokenizer', "),
        ("tracking", True, "tracking: input should be 'off', 'offline' or 'online' (it is true)"),
        ("sft.blend", None, "sft.blend: input should be a valid list (it is null)"),
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
        (
            "pathvars",
            {"data": "all", "ckpt": "./all"},
            "pathvars.ckpt: 'all' is the directory of pathvars",
        ),
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
        ("pathvars.ckpt", "~/ckpt", "pathvars.ckpt: '~/ckpt': only a shell reads ~ as your home; give the"),
        ("tokenizer.text", ["a", "b\n"], "tokenizer.text[1]: 'b\\n' holds a line break or another control"),
        (
            "tokenizer.path",
            "--help",
            "tokenizer.path: '--help' starts with a dash, as the options of programs",
        ),
        ("curation.evaluation", ["{}"], "curation.evaluation[0]: '{}' holds a brace"),
        ("sources_lock", "a\udcff", """holds text that is not UTF-8: '{"sources_lock": "a\\udcff"}'"""),
        ("corpora", [], "pretrain.phases[0].blend[0].corpus: 'docs' is not defined; known: none"),
        ("pretrain.phases", [], "pretrain.phases: list should have at least 1 item"),
        (
            "sft.optimizer.learning_rate",
            float("inf"),
            "sft.optimizer.learning_rate: input should be a finite",
        ),
        ("sft.optimizer.weight_decay", float("nan"), "sft.optimizer.weight_decay: input should be"),
        (  # twice this is no number any more, and shares of it would be 0
            "sft.blend",
            [{"source": "tools", "weight": 1e308}, {"source": "questions", "weight": 1e308}],
            "sft.blend[0].weight: input should be less than or equal to 9007199254740992 (it is 1e+308)",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_path(path, value, message):
    assert message in refusal(nested(path, value))


def test_a_root_that_leads_nowhere_is_told_with_where_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a link to a scratch that was purged, or that this node has not mounted."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to("/scratch/gone")
    said = "pathvars.data: 'data' cannot be made, because 'data' leads to '/scratch/gone', which is not there"
    assert refusal({}) == said


def test_two_roots_that_are_links_to_one_scratch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training would take the directory of its data for one that is in the way of its link."""
    monkeypatch.chdir(tmp_path)
    Path("scratch").mkdir()
    for name in ("data", "ckpt"):
        Path(name).symlink_to("scratch")
    said = "pathvars.ckpt: 'ckpt' is the directory of pathvars.data; both hold `sft`"
    assert refusal({}) == said


def test_a_name_that_is_no_directory_name_is_refused():
    found = refusal({"corpora": [{"name": "My Docs", "paths": ["x.jsonl"]}]})
    assert found == "corpora[0].name: a name may hold a to z, 0 to 9 and _ alone (it is 'My Docs')"


@pytest.mark.parametrize("given", ["5c6b...e1", "ab" * 31, "AB" * 32, f"{'ab' * 32}\n"])
@pytest.mark.parametrize(("section", "key"), [("corpora", "tokens"), ("chats", "packs")])
def test_what_is_no_sha256_is_refused_before_a_job_compares_it(section: str, key: str, given: str):
    found = refusal({section: [{"name": "web", key: {"train": ["store/a"], "tokenizer_sha256": given}}]})
    at = f"{section}[0].{key}.tokenizer_sha256"
    assert found == f"{at}: string should match pattern '^[0-9a-f]{{64}}$' (it is {given!r})"


def test_a_missing_key_of_a_list_item_is_named():
    assert refusal({"corpora": [{"paths": ["a.jsonl"]}]}) == "corpora[0].name: missing"


BLEND = {"pretrain": {"phases": [{"name": "p", "tokens": 10**6, "blend": [{"corpus": "a", "weight": 1}]}]}}


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({}, "corpora[0] (a): give one of paths, hub and tokens"),
        ({"paths": ["x"], "hub": {"repository": "o/n"}}, "corpora[0] (a): give one of paths, hub and tokens"),
        (
            {"paths": ["x"], "where": {"lang": ["en", False], "ok": [True, 1]}},
            "corpora[0].where.lang: YAML takes yes, no, on, off for truth values; give texts in quotes: 'no'",
        ),
        (
            {"paths": ["x"], "metadata_fields": ["url", "row"]},
            "corpora[0].metadata_fields: 'row' is a column that the workflow adds; leave it out",
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
