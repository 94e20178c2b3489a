"""The same tasks through an export and lm-eval's own `hf` model give the numbers of our LM."""

from __future__ import annotations

import json
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config.evaluation import Task
from snaketron.data.chats.template import load_template
from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
from snaketron.files import write_json
from snaketron.inference.exporting import export_checkpoint
from snaketron.inference.harness import CheckpointLM, _offline, run_task, task_manager
from snaketron.inference.opening import open_checkpoint
from snaketron.report.evaluations import read_evaluations, table

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM

ROWS = [("the quick brown", 0), ("the lazy", 1), ("fox jumps over the", 1), ("quick", 0), ("dog", 0)]
KINDS = {
    "choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["fox", "dog over"]
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "answer": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["q"], max_gen_toks: 6}
metric_list: [{metric: chrf}]
""",
    "text": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A directory with a task of each kind of request, and their data."""
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{question} " * 9, "label": label} for question, label in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in KINDS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}")
    return tmp_path


def test_tasks_give_the_numbers_of_the_export_in_lm_evals_hf(
    publish, settings, tokenizer_dir: Path, tasks: Path
):
    """Texts of up to 60 tokens, and a model of 48, so that some are cut and some are scored in windows."""
    publish("pretrain/one", "0a", settings(seq_length=48, model={"init_method_std": 0.2})[0])
    path = tasks / "ckpt/pretrain/one"
    template = load_template(Path(__file__).parents[3] / "config/chat_template.jinja")
    eos = tokenizer_info(tokenizer_dir).eos_id
    own = CheckpointLM(open_checkpoint(path), load_tokenizer(tokenizer_dir), eos, template, batch_size=2)
    export_checkpoint(path, tasks / "hf/one")
    with _offline(cached=False):
        other = HFLM(pretrained=str(tasks / "hf/one"), device="cpu", batch_size=2, dtype="float32")
    assert (own.max_length, own.eot_token_id) == (other.max_length, other.eot_token_id) == (48, eos)
    here = {name: run_task(own, Task(name=name), directories=[tasks])[name] for name in KINDS}
    manager = task_manager("choice", (str(tasks),))
    with _offline(cached=False):
        found = lm_eval.simple_evaluate(other, tasks=list(KINDS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    for name, measures in here.items():
        there = {key.removesuffix(",none"): value for key, value in found["results"][name].items()}
        assert {key: there[key] for key in measures if key != "questions"} == pytest.approx(
            {key: value for key, value in measures.items() if key != "questions"}, rel=1e-4
        )
        assert measures["questions"] == len(ROWS)
    # lm-eval's own file is a column beside ours.
    write_json(tasks / "own.json", {"stage": "pretrain/one", "tasks": here})
    write_json(tasks / "hf.json", {"results": found["results"], "model_name": "hf/one"})
    lines = table(read_evaluations([tasks / "own.json", tasks / "hf.json"])).splitlines()
    assert lines[0].split() == ["|", "data", "|", "measure", "|", "pretrain/one", "|", "hf/one", "|"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert len(cells) == 5
    assert all(float(ours) == pytest.approx(float(theirs), rel=1e-4) for _, _, ours, theirs in cells)
