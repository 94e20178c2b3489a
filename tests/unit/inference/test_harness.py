"""Tasks of lm-eval's harness, asked of a model that was never trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config.evaluation import Task
from snaketron.data.chats.template import load_template
from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
from snaketron.inference.generate import generate
from snaketron.inference.harness import CheckpointLM, run_task
from snaketron.log import UserError
from snaketron.model.build import build_model

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.dummy import DummyLM

CHOICE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["fox", "dog"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def model(settings, tokenizer_dir: Path) -> CheckpointLM:
    built = build_model(*settings(seq_length=64), 300)
    template = load_template(Path(__file__).parents[3] / "config/chat_template.jinja")
    tokenizer, ends = load_tokenizer(tokenizer_dir), [tokenizer_info(tokenizer_dir).eos_id]
    return CheckpointLM(built, tokenizer, ends, template, batch_size=2, begin=None)


def log_probability(model: CheckpointLM, before: list[int], text: list[int]) -> float:
    ids = before + text
    with model.built.evaluating():
        logits = model.built.model(torch.tensor([ids]), torch.arange(len(ids))[None], None)[0, :-1, :300]
    logs = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return float(logs[len(before) - 1 :].sum())


def request(kind: str, *arguments) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_probability_of_a_continuation_is_that_of_its_tokens(model):
    context, text = "the quick brown", " fox jumps"
    ((found, greedy),) = model.loglikelihood([request("loglikelihood", context, text)], disable_tqdm=True)
    before, both = model.tok_encode(context), model.tok_encode(context + text)
    assert found == pytest.approx(log_probability(model, before, both[len(before) :]), rel=1e-5)
    assert greedy is False


def test_a_continuation_that_is_longer_than_the_model_was_trained_on_is_refused(model):
    """64 tokens have a score, however long the context is, and 65 have none."""
    context, tokens = model.tok_encode("the quick brown " * 20), model.tok_encode("fox " * 80)[:65]
    ((found, _),) = model._loglikelihood_tokens([(("", ""), context, tokens[:64])])
    assert found == pytest.approx(log_probability(model, context[-1:], tokens[:64]), rel=1e-5)
    with pytest.raises(UserError, match=r"a text of 65 tokens has no score: .* trained on up to 64;"):
        model._loglikelihood_tokens([(("", ""), context, tokens)])


def test_a_long_text_is_scored_in_windows_and_each_token_once(model):
    """More than 64 tokens for a model of 64: the second window ends with the text, and has 64 tokens."""
    text = "fox " * 100
    ids = model.tok_encode(text)
    assert 64 < len(ids) <= 128
    (found,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    expected = log_probability(model, [model.eot_token_id], ids[:64])
    expected += log_probability(model, ids[len(ids) - 65 : 64], ids[64:])
    assert found == pytest.approx(expected, rel=1e-5)


def test_an_answer_ends_before_the_text_that_ends_it(model):
    """The model's own third token is what ends the answer of a second request."""
    context = "the quick"
    (whole,) = generate(model.built, [model.tok_encode(context)], stop=[], max_tokens=6)
    texts = [model._decode([token]) for token in whole]
    options = {"until": [], "max_gen_toks": 6}
    ended = {"until": [texts[2]], "max_gen_toks": 6}
    found = model.generate_until(
        [request("generate_until", context, options), request("generate_until", context, ended)],
        disable_tqdm=True,
    )
    assert found[0] == model._decode(whole)
    assert found[1] == found[0].partition(texts[2])[0]


def answered(model: CheckpointLM, **options: Any) -> str:
    (found,) = model.generate_until([request("generate_until", "the quick", options)], disable_tqdm=True)
    return found


def test_an_answer_ends_with_any_of_the_tokens_that_end_one(model):
    """A tuned model ends it with the template's token, and a generation of the export ends there too."""
    ids = model.tok_encode("the quick")
    (whole,) = generate(model.built, [ids], stop=[], max_tokens=6)
    first = whole.index(whole[2])  # where the model first says its third token
    model._ends = [model.eot_token_id, whole[2]]
    assert answered(model, max_gen_toks=6) == model._decode(whole[: first + 1])


def test_options_of_an_answer_are_those_of_lm_eval(model):
    """Other names of a length; a temperature that makes an answer drawn; and what would be passed over."""
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert answered(model, **{name: 3}) == answered(model, max_gen_toks=3)
    drawn = answered(model, max_gen_toks=20, do_sample=True, temperature=1.0)
    assert answered(model, max_gen_toks=20, temperature=1.0) == drawn != answered(model, max_gen_toks=20)
    plain = {"num_beams": 1, "repetition_penalty": 1.0, "top_k": None}
    assert answered(model, max_gen_toks=3, **plain) == answered(model, max_gen_toks=3)
    with pytest.raises(UserError, match=r"generation_kwargs of a task has num_beams: 2, top_k: 5; answers"):
        answered(model, top_k=5, num_beams=2)


def test_an_answer_to_nothing_begins_a_text_and_one_without_room_is_refused(model):
    options = {"until": [], "max_gen_toks": 6}
    (found,) = model.generate_until([request("generate_until", "", options)], disable_tqdm=True)
    (whole,) = generate(model.built, [[model.eot_token_id]], stop=[model.eot_token_id], max_tokens=6)
    assert found == model._decode(whole)
    with pytest.raises(UserError, match=r"answers of up to 64 tokens leave no room .* trained on up to 64;"):
        model.generate_until([request("generate_until", "fox", {"max_gen_toks": 64})], disable_tqdm=True)


def test_a_task_of_a_directory_runs_offline(
    model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The label of each of four questions is set to the more probable choice, or to the other one."""
    questions = ["the quick brown", "the lazy", "jumps over", "quick"]
    labels = []
    for number, question in enumerate(questions):
        ids = [model.tok_encode(f"{question} {choice}") for choice in ("fox", "dog")]
        before = model.tok_encode(question)
        scores = [log_probability(model, before, each[len(before) :]) for each in ids]
        best = scores.index(max(scores))
        labels.append(best if number < 3 else 1 - best)
    data = tmp_path / "data.jsonl"
    rows = [{"question": q, "label": label} for q, label in zip(questions, labels, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(CHOICE.format(name="animals", data=data))
    monkeypatch.chdir(tmp_path)  # no repository
    assert run_task(model, Task(name="animals"), directories=[tmp_path]) == {
        "animals": {"acc": 0.75, "questions": 4}
    }
    said = capfd.readouterr().err
    assert "not a git repository" not in said and "100%" not in said
    limited = run_task(model, Task(name="animals"), directories=[tmp_path], limit=2)
    assert limited["animals"] == {"acc": 1.0, "questions": 2}


# By the name of a task: rows of its data set, as the hub has them; and the configurations and splits.
_CHOICES = {"label": ["A", "B"], "text": ["fox", "dog"]}
DATA_SETS = {
    "arc_challenge": (
        {"id": "1", "question": "Who jumps?", "choices": _CHOICES, "answerKey": "A"},
        ["ARC-Challenge"],
        ["train", "validation", "test"],
    ),
    "hellaswag": (
        {
            **{"ind": 1, "activity_label": "Run", "ctx_a": "The fox", "ctx_b": "it", "ctx": "The fox it"},
            **{"endings": ["runs.", "jumps.", "sits.", "eats."], "label": "1", "split": "val"},
        },
        ["default"],
        ["train", "validation"],
    ),
    "openbookqa": (
        {"id": "1", "question_stem": "The fox", "choices": _CHOICES, "answerKey": "B"},
        ["main"],
        ["train", "validation", "test"],
    ),
    "winogrande": (
        {"sentence": "The fox met the dog and _ ran.", "option1": "fox", "option2": "dog", "answer": "2"},
        ["winogrande_xl"],
        ["train", "validation"],
    ),
    "mmlu_other": (
        {"question": "Who jumps?", "subject": "foxes", "choices": ["a", "b", "c", "d"], "answer": 2},
        [
            *("business_ethics", "clinical_knowledge", "college_medicine", "global_facts"),
            *("human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition"),
            *("professional_accounting", "professional_medicine", "virology"),
        ],
        ["test", "dev"],
    ),
}


_ASKED = {"question": "jumps?", "ctx_a": "The fox", "question_stem": "The fox", "sentence": "The fox met"}


class Listening(DummyLM):
    """Answers at random, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.contexts: list[str] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self.contexts += [request.args[0] for request in requests]
        return super().loglikelihood(requests, disable_tqdm)


def write_data(directory: Path, name: str, rows: int) -> str:
    """Write the data set of a task; returns the key of what is asked in a row."""
    row, configurations, splits = DATA_SETS[name]
    asked = next(key for key in _ASKED if key in row)
    made = [row | {asked: f"{number}. {row[asked]}"} for number in range(rows)]
    listed = []
    for configuration in configurations:
        (directory / configuration).mkdir(exist_ok=True)
        for split in splits:
            file = directory / configuration / f"{split}-00000-of-00001.parquet"
            pq.write_table(pa.Table.from_pylist(made), file)
        files = [{"split": split, "path": f"{configuration}/{split}-*"} for split in splits]
        listed.append({"config_name": configuration, "data_files": files})
    (directory / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    return asked


@pytest.mark.parametrize("name", DATA_SETS)
def test_tasks_and_groups_read_a_directory_as_it_is_downloaded(tmp_path: Path, name: str):
    """The README.md of a data set says which files a configuration has."""
    asked, configurations = write_data(tmp_path, name, rows=6), DATA_SETS[name][1]
    model = Listening()
    found = run_task(model, Task(name=name, data=str(tmp_path), num_fewshot=5), limit=1)
    assert sum(values["questions"] == 1 for values in found.values()) >= len(configurations)
    assert all(0 <= values["acc"] <= 1 for values in found.values())
    # Five solved ones, and the question itself.
    assert {context.count(_ASKED[asked]) for context in model.contexts} == {6}


def test_data_that_has_changed_is_read_again(tmp_path: Path):
    for rows in (2, 3):
        write_data(tmp_path, "openbookqa", rows)
        found = run_task(DummyLM(), Task(name="openbookqa", data=str(tmp_path)))
        assert found["openbookqa"]["questions"] == rows


def test_a_task_that_is_not_known_or_has_no_data_here_is_refused(model, tmp_path: Path):
    with pytest.raises(UserError, match=r"eval\.tasks: animals is no task of lm-eval"):
        run_task(model, Task(name="animals"))
    with pytest.raises(UserError, match=r"hellaswg is no task of lm-eval [\d.]+; did you mean 'hellaswag'\?"):
        run_task(model, Task(name="hellaswg"))
    with pytest.raises(UserError, match=r"eval\.tasks: openbookqa: .* is no directory"):
        run_task(model, Task(name="openbookqa", data=str(tmp_path / "none")))
    with pytest.raises(UserError, match="the data of openbookqa is not on this machine"):
        run_task(model, Task(name="openbookqa"))
    data = tmp_path / "data.jsonl"
    (tmp_path / "rows.yaml").write_text(CHOICE.format(name="rows", data=data))
    for text, problem in (("", "StopIteration"), ('{"text": "a"}\n', "'question' is undefined")):
        data.write_text(text)
        with pytest.raises(UserError, match=f"rows cannot be made of its data .*{problem}.* its YAML"):
            run_task(model, Task(name="rows"), directories=[tmp_path])
    data.write_text('{"question": "a", "label": 0}\n')
    more = {"name": "rows", "num_fewshot": 3}
    (tmp_path / "rows.yaml").write_text(CHOICE.format(name="rows", data=data) + "fewshot_split: test\n")
    with pytest.raises(UserError, match=r"rows fails in lm-eval \(ValueError: Sample larger .* num_fewshot"):
        run_task(model, Task.model_validate(more), directories=[tmp_path])


def test_a_fault_of_the_model_is_not_called_one_of_the_task(model, tmp_path: Path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "a", "label": 0}\n')
    (tmp_path / "rows.yaml").write_text(CHOICE.format(name="rows", data=data))

    def fail(*_args, **_options):
        raise ValueError("of the model")

    monkeypatch.setattr("snaketron.inference.harness.score", fail)
    with pytest.raises(ValueError, match="of the model"):
        run_task(model, Task(name="rows"), directories=[tmp_path])
