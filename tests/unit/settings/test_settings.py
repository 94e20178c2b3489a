"""What defines a training and what only says how it is run."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from datetime import date
from typing import Any

from snaketron.config import Adapters, Config, load
from snaketron.log import UserError
from snaketron.settings.chats import RenderSettings, render_settings
from snaketron.settings.evaluation import EvalSettings, eval_run, eval_settings
from snaketron.settings.training import (
    LoraSettings,
    RunSettings,
    TrainSettings,
    run_settings,
    template_date,
    train_settings,
)
from tests.conftest import REPOSITORY

import pytest

MIX = [{"corpus": "docs", "weight": 1}]
PHASES = [
    {"name": "first", "tokens": 5_000, "blend": MIX},
    {"name": "second", "tokens": 4_000, "blend": MIX, "seq_length": 50, "global_batch_size": 20},
    {"name": "third", "tokens": 2_000, "blend": MIX},
]
PRETRAIN = {"seq_length": 100, "global_batch_size": 12, "micro_batch_size": 4, "warmup_tokens": 600}


def curriculum(decay_tokens: int = 3_000, **changes: int) -> Config:
    """Three phases of 5,000, 4,000 and 2,000 tokens, or what `changes` gives by the name of the phase."""
    phases = [phase | {"tokens": changes.get(phase["name"], phase["tokens"])} for phase in PHASES]
    return load({"pretrain": PRETRAIN | {"decay_tokens": decay_tokens, "phases": phases}}, {})


# ------------------------------------------------------------------------------------------ the curriculum


def test_tokens_are_rounded_up_to_whole_steps_and_the_phases_follow_each_other():
    """A step has 1,200 tokens, in the second phase 1,000: 5, 4 and 2 steps."""
    config = curriculum()
    found = [train_settings(config, f"pretrain/{name}") for name in ("first", "second", "third")]
    assert [s.train_iters for s in found] == [5, 4, 2]
    assert [(s.global_batch_size, s.seq_length) for s in found] == [(12, 100), (20, 50), (12, 100)]
    assert [s.schedule.increment for s in found] == [1_200, 1_000, 1_200]
    assert [s.schedule.start for s in found] == [0, 6_000, 10_000]
    assert found[-1].schedule.end == 10_000 + 2 * 1_200
    assert [s.stage for s in found] == ["pretrain/first", "pretrain/second", "pretrain/third"]


@pytest.mark.parametrize(
    ("decay_tokens", "decaying"),
    [
        # The curriculum has 12,400 tokens; the phases end at 6,000, 10,000 and 12,400.
        (0, []),
        (2_400, ["third"]),
        (2_401, ["second", "third"]),
        (6_400, ["second", "third"]),
        (6_401, ["first", "second", "third"]),
    ],
)
def test_a_phase_decays_when_the_decay_begins_before_its_end(decay_tokens, decaying):
    config = curriculum(decay_tokens)
    schedules = {n: train_settings(config, f"pretrain/{n}").schedule for n in ("first", "second", "third")}
    assert [name for name, schedule in schedules.items() if schedule.decay] == decaying
    assert all(s.end == 12_400 and s.decay == decay_tokens for s in schedules.values() if s.decay)


def test_a_phase_before_the_decay_does_not_depend_on_what_follows():
    short, long = curriculum(), curriculum(third=50_000)
    assert train_settings(short, "pretrain/first") == train_settings(long, "pretrain/first")
    decays, goes_on = (train_settings(config, "pretrain/second") for config in (short, long))
    assert decays != goes_on


def test_a_phase_depends_on_those_before_it():
    assert train_settings(curriculum(first=7_000), "pretrain/second").schedule.start == 7_200


def test_a_warm_up_longer_than_the_phase_ends_in_the_next_one():
    """The scheduler wants the warm-up to end before the schedule; no step of the phase gets there."""
    phases = [PHASES[0] | {"tokens": 1_200}, PHASES[2] | {"tokens": 6_000}]
    values = PRETRAIN | {"warmup_tokens": 2_000, "decay_tokens": 1_200, "phases": phases}
    schedule = train_settings(load({"pretrain": values}, {}), "pretrain/first").schedule
    assert (schedule.warmup, schedule.end, schedule.decay) == (2_000, 2_001, 0)


def test_sft_counts_in_steps_of_packs():
    config = load(
        {"sft": {"train_iters": 7, "warmup_iters": 3, "global_batch_size": 4}, "sft_data": {"pack_size": 64}},
        {},
    )
    settings = train_settings(config, "sft")
    assert (settings.seq_length, settings.global_batch_size, settings.train_iters) == (64, 4, 7)
    assert settings.schedule.model_dump() == {
        "style": "cosine",
        "start": 0,
        "warmup": 3,
        "end": 7,
        "decay": 0,
        "increment": 1,
    }


# -------------------------------------------------------------------------- what makes a training run again

# A different valid value of each key; numbers double where nothing is said.
OTHER: dict[str, Any] = {
    "tracking": "offline",
    "tracking_upload": ["sft-model"],
    "tensorboard": True,
    "notify.command": ["tell"],
    "model.hybrid_layer_pattern": "MEM*EM-",
    "model.mtp_hybrid_layer_pattern": "*-",
    "model.precision": "fp32",
    "model.bf16_layers_at_end": 2,
    "pretrain.cuda_graphs": True,
    **{f"{s}.cuda_graphs": False for s in ("sft", "lora")},
    **{f"{s}.save_in_background": True for s in ("pretrain", "sft", "lora")},
    **{
        f"{s}.optimizer.{k}_precision": "bf16"
        for s in ("pretrain", "sft", "lora")
        for k in ("gradient", "moment")
    },
    **{f"{s}.precision": "fp32" for s in ("sft", "lora")},
    **{f"{s}.recompute": ["moe"] for s in ("pretrain", "sft", "lora")},
    **{f"{s}.offload_optimizer": 0.5 for s in ("pretrain", "sft", "lora")},
    "model.moe_router_topk": 1,
    "model.mamba_num_groups": 4,
    "model.num_query_groups": 4,
    "model.num_attention_heads": 16,
    "pretrain.micro_batch_size": 2,
    "pretrain.warmup_tokens": 5_000,
    "pretrain.decay_tokens": 5_000,
    "pretrain.optimizer.adam_beta1": 0.8,
    "pretrain.optimizer.adam_beta2": 0.8,
    **{f"{s}.optimizer.adam_beta{i}": 0.8 for s in ("sft", "lora") for i in (1, 2)},
    **{f"{s}.micro_batch_size": None for s in ("sft", "lora")},  # 1 only
    **{f"{s}.loss_average": "sample" for s in ("sft", "lora")},
    **{f"{s}.switch_loss_average_after": 20 for s in ("sft", "lora")},
    **{f"{s}.sample_interval": 20 for s in ("sft", "lora")},
    **{f"{s}.steady_interval": 20 for s in ("pretrain", "sft", "lora")},
    **{f"{s}.moe_token_dispatcher": "hybridep" for s in ("pretrain", "sft", "lora")},
    **{
        f"{s}.moe_shared_expert_overlap": ("model.moe_latent_size", None, True)
        for s in ("pretrain", "sft", "lora")
    },
    "lora.expert_rank": 2,
    "lora.dropout": 0.1,
    "lora.target_modules": ["in_proj", "linear_qkv"],
    **{f"{s}.optimizer.weight_decay": 0.1 for s in ("sft", "lora")},
    **{f"{s}.parallel.pipeline_split": "layers" for s in ("pretrain", "sft", "lora", "eval")},
    "pretrain.parallel.expert_model_parallel_size": ("pretrain.parallel.data_parallel_size", 2),
    "pretrain.parallel.expert_tensor_parallel_size": ("pretrain.parallel.data_parallel_size", 2),
    **{
        f"{s}.parallel.expert_{k}_parallel_size": (f"{s}.parallel.data_parallel_size", 2)
        for s in ("sft", "lora")
        for k in ("model", "tensor")
    },
    "pretrain.tokens_per_second_per_gpu": 100.0,
    "sft.tokens_per_second_per_gpu": 100.0,
    "lora.tokens_per_second_per_gpu": 100.0,
    **{
        f"eval.parallel.expert_{k}_parallel_size": ("eval.parallel.data_parallel_size", 2)
        for k in ("model", "tensor")
    },
    "eval.tasks": [{"name": "mmlu"}],
    "eval.task_directories": ["tasks"],
    "eval.task_limit": 5,
    "eval.apply_chat_template": True,
    "cluster.gpus_per_node": 8,
    "cluster.tasks_per_node": 8,
    "cluster.gpu": "h100",
    "cluster.gpu_memory_gb": 80.0,
    "cluster.container": "a.sif",
    "cluster.container_runtime": "pyxis",
    "cluster.mounts": ["/data"],
    "cluster.cache_dir": "/scratch",
    "cluster.environment": {"NCCL_DEBUG": "INFO"},
    "cluster.secrets_file": "secrets",
}
# Identified by the files that they make.
DATA = (
    "pathvars",
    "tokenizer",
    "corpora",
    "sources_lock",
    "curation",
    "chats",
    "pretrain_data",
    "sft_data",
    "pretrain.phases",
    "sft.blend",
    "pretrain.base",
    "pretrain.merge_tokens",
    "sft.base",
    "lora.base",
)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and not path.startswith(DATA):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def change(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, name = path.split(".")
    for section in sections:
        values = values[section]
    values[name] = value


LAST = "pretrain/focused"  # of the default phases, the one that decays


def parts(config: Config) -> dict[str, str]:
    return {
        "pretrain": train_settings(config, LAST).model_dump_json(),
        "sft": train_settings(config, "sft").model_dump_json(),
        "lora": train_settings(config, "lora").model_dump_json(),
        "run pretrain": run_settings(config, LAST).model_dump_json(),
        "run sft": run_settings(config, "sft").model_dump_json(),
        "run lora": run_settings(config, "lora").model_dump_json(),
        "eval": eval_settings(config, "sft", {}).model_dump_json(),
        "run eval": eval_run(config).model_dump_json(),
    }


def expected(path: str) -> set[str]:
    section, _, key = path.partition(".")
    if path == "seed" or section == "model":
        return {"pretrain", "sft", "lora"}
    if section in ("tracking", "tracking_upload", "tensorboard", "notify", "cluster"):
        trainings = {"run pretrain", "run sft", "run lora"}
        return {*trainings, "run eval"} if section == "cluster" else trainings
    of_result = (
        "optimizer",
        "seq_length",
        "global_batch_size",
        "train_iters",
        "warmup",
        "decay",
        "loss",
        "precision",
        "switch",
        *Adapters.model_fields,
        *EvalSettings.model_fields,
    )
    return {section} if key.startswith(of_result) else {f"run {section}"}


def roomy() -> dict[str, Any]:
    """The defaults with batches that divide by two processes, in bf16, which has more precisions of state."""
    values = Config().model_dump(mode="json")
    values["model"]["precision"] = "bf16"
    values["pretrain"] |= {"global_batch_size": 16, "micro_batch_size": 4}
    values["sft"]["global_batch_size"] = values["lora"]["global_batch_size"] = 4
    return values


KEYS = [
    (path, value)
    for path, value in leaves(roomy())
    if not path.startswith(DATA) and OTHER.get(path, ...) is not None
]


@pytest.mark.parametrize(("path", "value"), KEYS, ids=[path for path, _ in KEYS])
def test_each_key_is_of_the_result_or_of_the_run(path, value):
    """Changing a key changes the one part that it belongs to, and no key is in neither or in both."""
    values = roomy()
    other = OTHER.get(path, value * 2 if isinstance(value, int | float) else value)
    if isinstance(other, tuple):
        change(values, *other[:2])
        other = next(iter(other[2:]), 2)
    before = parts(load(values, {}))
    change(values, path, other)
    after = parts(load(values, {}))
    assert {name for name in after if after[name] != before[name]} == expected(path)


def test_the_pack_size_is_of_the_result():
    """It is the sequence length of SFT; the other keys of the data are in the data's own files."""
    assert train_settings(load({"sft_data": {"pack_size": 512}}, {}), "sft").seq_length == 512


def test_no_key_is_in_both_parts():
    assert not set(TrainSettings.model_fields) & set(RunSettings.model_fields)


def test_settings_survive_the_command_line():
    config = Config()
    settings, run = train_settings(config, "sft"), run_settings(config, "sft")
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings
    assert RunSettings.model_validate_json(run.model_dump_json()) == run
    assert json.loads(run.model_dump_json())["num_samples"] == 40
    lora = train_settings(config, "lora")
    assert LoraSettings.model_validate_json(lora.model_dump_json()) == lora


def test_lora_is_sft_with_adapters_and_values_of_its_own():
    """On the same data: it has every key of SFT but the blend."""
    values = {"sft": {"train_iters": 50}, "lora": {"train_iters": 20, "rank": 4, "alpha": 2.0}}
    config = load(values, {})
    settings = train_settings(config, "lora")
    assert isinstance(settings, LoraSettings)
    assert (settings.stage, settings.train_iters, settings.lora.rank, settings.lora.alpha) == (
        "lora",
        20,
        4,
        2,
    )
    assert train_settings(config, "sft").train_iters == 50
    assert set(type(config.lora).model_fields) == (
        set(type(config.sft).model_fields) - {"blend"} | set(Adapters.model_fields)
    )


# ----------------------------------------------------------------------------------------- conversations


def test_keys_that_came_later_are_in_the_settings_of_chats_only_where_they_are_given():
    """So conversations that were rendered before are found finished."""
    later = {
        "system_field": None,
        "role_key": "from",
        "content_key": "value",
        "roles": {"human": "user"},
        "thinking_tags": ["[THINK]", "[/THINK]"],
        "template_date": "2025-02-03",
    }
    source = {"name": "a", "paths": ["a.jsonl"]}
    given = {name: value for name, value in later.items() if name != "template_date"}
    blend = {"sft": {"blend": [{"source": "a", "weight": 1}]}}
    plain = load(blend | {"chats": [source]}, {})
    changed = load(
        blend | {"chats": [source | given], "sft_data": {"template_date": later["template_date"]}}, {}
    )
    before = render_settings(plain, plain.chats[0]).model_dump_json()
    assert not later.keys() & json.loads(before).keys()
    after = json.loads(render_settings(changed, changed.chats[0]).model_dump_json())
    assert after == json.loads(before) | later
    assert RenderSettings.model_validate(after).model_dump(mode="json") == after


def test_a_checkpoint_keeps_the_date_that_its_template_was_told():
    """So chat, evaluation and export tell it the same; the default changes no checkpoint of before."""
    assert "template_date" not in run_settings(load({}, {}), "sft").model_dump()
    assert template_date({}) == date(2026, 1, 1)
    run = run_settings(load({"sft_data": {"template_date": "2026-07-04"}}, {}), "sft")
    assert template_date(run.model_dump()) == date(2026, 7, 4)
    assert RunSettings.model_validate_json(run.model_dump_json(exclude_defaults=True)) == run


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("blend_sft.py --records a.json --output b --record c", "weights"),
        ("evaluate.py --checkpoint ckpt/sft --run-settings {} --output a.json", "stage"),
        ("pretrain.py --blend a --tokenizer b --run-settings {} --output c --index d", "stage"),
    ],
)
def test_a_program_names_what_is_wrong_with_its_settings(command: str, wrong: str):
    program, *options = command.split()
    main = runpy.run_path(str(REPOSITORY / "scripts" / program))["main"]
    with pytest.raises(
        UserError, match=f"^--settings: {wrong}: Field required.*; paste what `snakemake -np`"
    ):
        main([*options, "--settings", "{}"])
