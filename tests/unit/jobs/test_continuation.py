"""What a longer training goes on from: phases of 4 sequences of 16 tokens a step, 64 tokens."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config import load
from snaketron.jobs import inventory
from snaketron.jobs.continuation import Origin, find, take_over, why_not
from snaketron.jobs.version import Version, version_key
from snaketron.settings.training import run_settings, train_settings
from snaketron.sizes.epochs import resized
from snaketron.sizes.outlook import Inputs

import orjson
import pytest
import yaml

STEP = 64
TOKENS = 1000  # of the only shard: 62 samples, 15 steps


def blend(steps: int, tokens: int = TOKENS, **keys: Any) -> dict[str, Any]:
    """What a blend.json of so many steps holds of interest."""
    corpus = {"corpus": "docs", "share": 1.0, "tokens": tokens, "taken": 0, "epochs": 0.0}
    train = {"weights": [1.0], "shards": [{"tokens": tokens}], "corpora": [corpus]}
    return resized({"phase": "one", "train": train} | keys, steps * STEP)


def identity(of: dict[str, Any]) -> str:
    return hashlib.sha256(files.to_json(of)).hexdigest()


def inputs(of: dict[str, Any], *others: str) -> Inputs:
    return Inputs([identity(of), *(others or ("tokenizer",))], of)


def phase(steps: int, decay: int, more: int = 0, **keys: Any) -> dict[str, Any]:
    """A first phase of a curriculum that decays over its last `decay` steps; `more` are of a second phase."""
    mix = [{"corpus": "docs", "weight": 1}]
    phases = [{"name": "one", "tokens": steps * STEP, "blend": mix}]
    phases += [{"name": "two", "tokens": more * STEP, "blend": mix}] if more else []
    pretrain = {"seq_length": 16, "global_batch_size": 4, "warmup_tokens": 2 * STEP, "phases": phases}
    seed = keys.pop("seed", 1)
    pretrain |= {"decay_tokens": decay * STEP} | {k: v for k, v in keys.items() if k != "model"}
    config = load({"seed": seed, "model": keys.get("model", {}), "pretrain": pretrain}, {})
    return train_settings(config, "pretrain/one").model_dump()


def sft(steps: int, rate: float, least: float) -> dict[str, Any]:
    optimizer = {"learning_rate": rate, "min_learning_rate": least}
    config = load({"sft": {"train_iters": steps, "warmup_iters": 2, "optimizer": optimizer}}, {})
    return train_settings(config, "sft").model_dump()


def new(root: Path, settings: dict[str, Any], of: Inputs) -> Version:
    key = version_key(settings, list(of.identities))
    return Version.of(root / settings["stage"], settings["stage"], key)


def trained(root: Path, settings: dict[str, Any], of: Inputs, *iterations: int) -> Version:
    """A version with checkpoints after so many steps, and what a training writes beside them."""
    version = new(root, settings, of)
    names = ("sha256", "sha256", "version")
    entries = [{name: value} for name, value in zip(names, of.identities, strict=False)]
    content = {"settings": settings, "inputs": entries}
    files.write_text(version.config, yaml.safe_dump(content))
    for iteration in iterations:
        files.write_text(version.iteration_directory(iteration) / "__0_0.distcp", f"weights {iteration}")
    files.write_text(version.latest, str(iterations[-1]))
    return version


def found(root: Path, settings: dict[str, Any], of: Inputs) -> int | None:
    origin = find(new(root, settings, of), settings, of)
    return origin and origin.iteration


# ------------------------------------------------------------------------------------- how far it goes


def test_a_longer_phase_goes_on_from_where_the_rate_began_to_fall(tmp_path: Path):
    """10 steps that fall over the last 4; of 14 steps the first 6 have the same rates."""
    trained(tmp_path, phase(10, 4), inputs(blend(10)), 3, 6, 9, 10)
    assert found(tmp_path, phase(14, 4), inputs(blend(14))) == 6
    assert found(tmp_path, phase(14, 6), inputs(blend(14))) == 6  # falls from step 8 on
    assert found(tmp_path, phase(14, 10), inputs(blend(14))) == 3  # falls from step 4 on
    assert found(tmp_path, phase(6, 2), inputs(blend(6))) == 3  # a shorter one, from step 4 on
    assert found(tmp_path, phase(14, 12), inputs(blend(14))) is None  # falls after the warm-up of 2


def test_a_phase_that_never_falls_goes_on_from_its_end(tmp_path: Path):
    """The rate falls in the second phase, whose length does not concern the first one."""
    trained(tmp_path, phase(10, 4, more=5), inputs(blend(10)), 5, 10)
    assert found(tmp_path, phase(14, 4, more=9), inputs(blend(14))) == 10
    assert found(tmp_path, phase(12, 7, more=3), inputs(blend(12))) == 5  # falls from step 8 on


def test_a_further_phase_takes_the_decay_away_from_the_one_before_it(tmp_path: Path):
    trained(tmp_path, phase(10, 4), inputs(blend(10)), 6, 10)
    assert found(tmp_path, phase(10, 4, more=6), inputs(blend(10))) == 6


def test_the_newest_of_all_versions_is_taken(tmp_path: Path):
    trained(tmp_path, phase(10, 4), inputs(blend(10)), 6, 10)
    trained(tmp_path, phase(12, 4), inputs(blend(12)), 8)  # stopped
    assert found(tmp_path, phase(14, 4), inputs(blend(14))) == 8


NINE_KEYS = (
    "hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "moe_ffn_hidden_size",
    "moe_latent_size",
    "moe_shared_expert_intermediate_size",
)


@pytest.mark.parametrize(
    ("changed", "of", "why"),
    [
        (phase(14, 4, seed=2), inputs(blend(14)), "other than before: seed"),
        (phase(14, 4) | {"data_seed": 2}, inputs(blend(14)), "other than before: pretrain.phases[].seed"),
        (
            phase(14, 4, model={"moe_router_topk": 3}),
            inputs(blend(14)),
            "other than before: model.moe_router_topk",
        ),
        (
            phase(14, 4, model=dict.fromkeys(NINE_KEYS, 512)),
            inputs(blend(14)),
            "other than before: model.hidden_size, model.ffn_hidden_size, model.kv_channels, "
            "model.mamba_num_heads, model.mamba_head_dim, model.mamba_state_dim, model.moe_ffn_hidden_size, "
            "model.moe_latent_size and 1 more",
        ),
        (phase(14, 4), inputs(blend(14, tokens=1001)), "other than before: the data"),
        (phase(14, 4), inputs(blend(14), "another"), "other than before: the tokenizer"),
        (
            phase(14, 4),
            inputs(blend(14), "tokenizer", "base"),
            "other than before: the checkpoint that it starts from",
        ),
        (phase(14, 10), inputs(blend(14)), "no checkpoint of the first 4 steps is left, after which its"),
        (phase(14, 4, warmup_tokens=0), inputs(blend(14)), "its learning rate falls from the first step on"),
    ],
)
def test_why_a_training_starts_over_is_told(tmp_path: Path, changed: dict, of: Inputs, why: str):
    before = trained(tmp_path, phase(10, 4), inputs(blend(10)), 6, 10)
    assert found(tmp_path, changed, of) is None
    assert why_not(new(tmp_path, changed, of), before, changed, of).startswith(why)


def test_a_constant_rate_of_a_tuning_is_prolonged_and_a_cosine_is_not(tmp_path: Path):
    of = Inputs(["blend", "tokenizer", "base"])
    before = trained(tmp_path, sft(10, 1e-3, 1e-4), of, 8, 10)
    longer = sft(15, 1e-3, 1e-4)
    assert found(tmp_path, longer, of) is None
    assert why_not(new(tmp_path, longer, of), before, longer, of).startswith("a cosine cannot be prolonged")
    trained(tmp_path, sft(10, 1e-3, 1e-3), of, 8, 10)
    assert found(tmp_path, sft(15, 1e-3, 1e-3), of) == 10


def test_a_dry_run_says_where_it_continues_or_why_it_starts_over(tmp_path: Path):
    before = trained(tmp_path, phase(10, 4), inputs(blend(10)), 6, 10)
    output = tmp_path / "pretrain/one"
    before.publish(output)
    progress = inventory.look(output, phase(14, 4), inputs(blend(14)))
    assert (progress.done, progress.origin) == (6, before.directory.name)
    progress = inventory.look(output, phase(14, 4, seed=2), inputs(blend(14)))
    assert (progress.done, progress.starts_over) == (0, "other than before: seed")
    # What it is made from is still to be made: then settings alone say it, or whether there was one before.
    progress = inventory.look(output, phase(14, 4, seed=2), None)
    assert (progress.published, progress.starts_over) == (True, "other than before: seed")
    progress = inventory.look(output, phase(14, 4), None)
    assert (progress.published, progress.starts_over) == (True, "")
    assert not inventory.look(
        tmp_path / "pretrain/two", phase(14, 4) | {"stage": "pretrain/two"}, None
    ).published


# --------------------------------------------------------------------------------------- taking it over


@pytest.fixture
def ended(tmp_path: Path) -> Version:
    """10 steps, with metrics every 4, a validation every 5 and answers every 3."""
    version = trained(tmp_path, phase(10, 4, more=5), inputs(blend(10)), 5, 10)
    lines = [{"iteration": 0, "valid_loss": 7}]
    lines += [{"iteration": 4, "loss": 6}, {"iteration": 5, "valid_loss": 5}, {"iteration": 8, "loss": 4}]
    lines += [{"iteration": 10, "loss": 3}, {"iteration": 10, "valid_loss": 2}]
    lines += [{"iteration": 10, "test_loss": 1}]
    files.write_text(version.metrics, b"".join(orjson.dumps(line) + b"\n" for line in lines))
    for iteration in (0, 3, 6, 9, 10):
        files.write_json(version.answers_after(iteration), [])
    return version


def test_a_version_begins_as_a_longer_training_would_have_left_it(tmp_path: Path, ended: Version):
    """The last line of metrics, the test and the last answers are those of an end that it does not have."""
    values = {"log_interval": 4, "eval_interval": 5}
    run = run_settings(load({"pretrain": values}, {}), "pretrain/broad")
    run = run.model_copy(update={"sample_interval": 3})
    version = Version(tmp_path / "versions/pretrain_one-longer")
    assert take_over(version, Origin(ended, 10), run)
    assert version.latest_iteration() == 10 and version.iterations() == [10]
    lines = [orjson.loads(line) for line in version.metrics.read_bytes().splitlines()]
    told = [(line["iteration"], next(key for key in line if key != "iteration")) for line in lines]
    assert told == [(0, "valid_loss"), (4, "loss"), (5, "valid_loss"), (8, "loss"), (10, "valid_loss")]
    assert [path.name for path in version.all_answers()] == [f"step_000000{i}.json" for i in (0, 3, 6, 9)]
    weights = version.iteration_directory(10) / "__0_0.distcp"
    assert weights.read_text() == "weights 10" and weights.stat().st_nlink == 2
    assert files.read_json(version.origin) == {"version": ended.directory.name, "iteration": 10}


def test_a_line_of_metrics_that_a_crash_damaged_is_left(tmp_path: Path, ended: Version):
    """What was not on the disk yet may be zeros; no longer training could begin there."""
    whole = ended.metrics.read_bytes()
    files.write_text(ended.metrics, bytes(8) + whole[8:])
    version = Version(tmp_path / "versions/pretrain_one-longer")
    assert take_over(version, Origin(ended, 10), run_settings(load({}, {}), "pretrain/broad"))
    steps = [orjson.loads(line)["iteration"] for line in version.metrics.read_bytes().splitlines()]
    assert steps == [4, 5, 8, 10]


def test_killed_while_it_takes_over_it_begins_again(tmp_path: Path, ended: Version):
    run = run_settings(load({}, {}), "pretrain/broad")
    version = Version(tmp_path / "versions/pretrain_one-longer")
    for left in (version.iteration_directory(10), files.partial(version.iteration_directory(10))):
        files.write_text(left / "__0_0.distcp", "half")
    assert version.latest_iteration() is None
    assert take_over(version, Origin(ended, 10), run)
    assert (version.iteration_directory(10) / "__0_0.distcp").read_text() == "weights 10"


def test_a_damaged_checkpoint_that_was_deleted_is_not_taken_over_again(tmp_path: Path, ended: Version):
    """The training said to delete it. Its other name has the same bytes, so the one before it is next."""
    settings, of, run = phase(14, 4, more=9), inputs(blend(14)), run_settings(load({}, {}), "pretrain/broad")
    version = new(tmp_path, settings, of)
    for iteration in (10, 5):
        origin = find(version, settings, of)
        assert origin is not None and origin.iteration == iteration
        assert take_over(version, origin, run)
        shutil.rmtree(version.iteration_directory(iteration))
    assert find(version, settings, of) is None


def test_a_checkpoint_that_is_deleted_meanwhile_is_left(tmp_path: Path, ended: Version):
    version = Version(tmp_path / "versions/pretrain_one-longer")
    run = run_settings(load({}, {}), "pretrain/broad")
    assert not take_over(version, Origin(ended, 7), run)
    assert version.latest_iteration() is None
