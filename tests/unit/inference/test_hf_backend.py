"""Tasks give the same numbers through an export and lm-eval's own `hf` model as on the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters
from snaketron.config.data import SPECIAL_TOKENS
from snaketron.config.evaluation import Task
from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.template import load_template
from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
from snaketron.files import read_json, write_json
from snaketron.inference.exporting import export_checkpoint
from snaketron.inference.harness import CheckpointLM, _offline, run_task, task_manager
from snaketron.inference.opening import open_checkpoint
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.model import lora
from snaketron.model.checkpoint import Saver
from snaketron.report.evaluations import markdown, read_evaluations
from snaketron.settings.training import LoraSettings

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

TEMPLATE = Path(__file__).parents[3] / "config/chat_template.jinja"
BEGIN = SPECIAL_TOKENS[2]  # of the texts of a tokenizer that has such a token
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
metric_list: [{metric: chrf}, {metric: exact_match}]
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


def own_model(path: Path, tokenizer_dir: Path, template_path: Path = TEMPLATE) -> CheckpointLM:
    template = load_template(template_path)
    ends, begin = [tokenizer_info(tokenizer_dir).eos_id], special_tokens(tokenizer_dir).get("bos_token")
    tokenizer = load_tokenizer(tokenizer_dir)
    return CheckpointLM(open_checkpoint(path), tokenizer, ends, template, batch_size=2, begin=begin)


def hf_model(path: Path, peft: Path | None = None) -> HFLM:
    with _offline(cached=False):
        return HFLM(
            pretrained=str(path), peft=peft and str(peft), device="cpu", batch_size=2, dtype="float32"
        )


def results_of(
    model: HFLM, tasks: Path, names: Iterable[str], *, apply_chat_template: bool = False
) -> dict[str, dict[str, Any]]:
    with _offline(cached=False):
        found = lm_eval.simple_evaluate(
            model,
            tasks=list(names),
            task_manager=task_manager("choice", (str(tasks),)),
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
        )
    assert found is not None
    return found["results"]


def check_equal(here: dict[str, dict[str, Any]], there: dict[str, dict[str, Any]]) -> None:
    for name, measures in here.items():
        other = {key.removesuffix(",none"): value for key, value in there[name].items()}
        assert {key: other[key] for key in measures if key != "questions"} == pytest.approx(
            {key: value for key, value in measures.items() if key != "questions"}, rel=1e-4
        )
        assert measures["questions"] == len(ROWS)


def test_tasks_give_the_numbers_of_the_export_in_lm_evals_hf(
    publish, settings, tokenizer_dir: Path, tasks: Path
):
    """Texts of up to 60 tokens, and a model of 48, so that some are cut and some are scored in windows."""
    publish("pretrain/one", "0a", settings(seq_length=48, model={"init_method_std": 0.2})[0])
    path = tasks / "ckpt/pretrain/one"
    own = own_model(path, tokenizer_dir)
    export_checkpoint(path, tasks / "hf/one")
    other = hf_model(tasks / "hf/one")
    assert (own.max_length, own.eot_token_id) == (other.max_length, other.eot_token_id)
    assert own.max_length == 48
    here = {name: run_task(own, Task(name=name), directories=[tasks])[name] for name in KINDS}
    there = results_of(other, tasks, KINDS)
    check_equal(here, there)
    # lm-eval's own file is a column beside that of rule evaluate.
    write_json(tasks / "own.json", {"stage": "pretrain/one", "tasks": here})
    found = {"results": there, "model_name": "hf/one"}
    (tasks / "hf.json").write_text(json.dumps(found, default=float))  # numbers of NumPy
    lines = markdown(read_evaluations([tasks / "own.json", tasks / "hf.json"])).splitlines()
    assert lines[0].split() == ["|", "data", "|", "measure", "|", "pretrain/one", "|", "hf/one", "|"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert len(cells) == 6
    assert all(float(ours) == pytest.approx(float(theirs), rel=1e-4) for _, _, ours, theirs in cells)


def test_a_model_that_was_tuned_on_short_packs_reads_as_much_of_a_text_as_its_export(
    publish, settings, tokenizer_dir: Path, tasks: Path
):
    """The texts of up to 60 tokens were cut to the 16 of a pack, and `hf` read 48 of them."""
    model = {"init_method_std": 0.2}
    publish("pretrain/one", "0a", settings(seq_length=48, model=model)[0])
    publish("sft", "0b", settings(seq_length=16, model=model)[0], base=tasks / "ckpt/pretrain/one")
    export_checkpoint(tasks / "ckpt/sft", tasks / "hf/sft")
    own, other = own_model(tasks / "ckpt/sft", tokenizer_dir), hf_model(tasks / "hf/sft")
    assert own.max_length == other.max_length == 48
    here = {name: run_task(own, Task(name=name), directories=[tasks])[name] for name in KINDS}
    check_equal(here, results_of(other, tasks, KINDS))


def test_an_answer_that_a_task_begins_goes_on_as_in_hf(publish, settings, tasks: Path):
    """After the words of the task, in the assistant's turn: not after the end of that turn."""
    publish("pretrain/one", "0a", settings(seq_length=96, model={"init_method_std": 0.2})[0])
    path = tasks / "ckpt/pretrain/one"
    directory = Version(path).tokenizer
    shutil.copy(TEMPLATE, directory / "chat_template.jinja")
    for name in ("choice", "answer"):
        with (tasks / f"{name}.yaml").open("a") as file:
            file.write('gen_prefix: "the fox"\n')
    export_checkpoint(path, tasks / "hf/one")
    own, other = own_model(path, directory), hf_model(tasks / "hf/one")
    names = ("choice", "answer")
    here = {
        name: run_task(own, Task(name=name), directories=[tasks], apply_chat_template=True)[name]
        for name in names
    }
    check_equal(here, results_of(other, tasks, names, apply_chat_template=True))


def test_a_template_that_takes_no_system_is_not_given_one_as_in_hf(publish, settings, tasks: Path):
    publish("pretrain/one", "0a", settings(seq_length=96)[0])
    path = tasks / "ckpt/pretrain/one"
    directory = Version(path).tokenizer
    refuses = "{% if messages[0].role not in ['user', 'assistant'] %}{{ raise_exception('no') }}{% endif %}"
    (directory / "chat_template.jinja").write_text(refuses + TEMPLATE.read_text())
    export_checkpoint(path, tasks / "hf/one")
    own, other = own_model(path, directory, directory / "chat_template.jinja"), hf_model(tasks / "hf/one")
    question = {"role": "user", "content": "why?"}
    asked = [{"role": "system", "content": "Be brief."}, question]
    assert own.apply_chat_template(asked) == other.apply_chat_template(asked)
    assert own.apply_chat_template(asked) == own.apply_chat_template([question])
    with pytest.raises(UserError, match=r"eval\.apply_chat_template: .* cannot write a question: .* no"):
        own.apply_chat_template([{"role": "critic", "content": "bad"}, question])


@pytest.mark.parametrize("added", [True, False], ids=["added", "not added"])
def test_a_token_that_begins_texts_stands_where_hf_has_it(publish, settings, tasks: Path, added: bool):
    """Before texts without a beginning, before others if the tokenizer adds it, and never twice."""
    publish("pretrain/one", "0a", settings(seq_length=48, model={"init_method_std": 0.2})[0])
    path = tasks / "ckpt/pretrain/one"
    directory = Version(path).tokenizer
    config = read_json(directory / "tokenizer_config.json")
    write_json(directory / "tokenizer_config.json", config | {"bos_token": BEGIN})
    tokenizer = load_tokenizer(directory)
    if added:
        begin = (BEGIN, tokenizer.token_to_id(BEGIN))
        tokenizer.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
        tokenizer.save(str(directory / "tokenizer.json"))
    export_checkpoint(path, tasks / "hf/one")
    own, other = own_model(path, directory), hf_model(tasks / "hf/one")
    for text in ("the fox", f"{BEGIN}the fox"):
        assert own.tok_encode(text) == other.tok_encode(text)
    here = {name: run_task(own, Task(name=name), directories=[tasks])[name] for name in KINDS}
    check_equal(here, results_of(other, tasks, KINDS))


def test_adapters_give_their_numbers_in_lm_evals_hf_beside_their_base_and_within_it(
    publish, settings, tokenizer_dir: Path, tasks: Path
):
    """The checkpoint of adapters as it is; in PEFT on the exported base; and merged, as a whole model."""
    values, run = settings(seq_length=48, model={"init_method_std": 0.2})
    base, path = tasks / "ckpt/pretrain/one", tasks / "ckpt/lora"
    publish("pretrain/one", "0a", values)
    # PEFT refuses out_proj.
    adapters = Adapters(target_modules=["linear_*", "in_proj", "router"], rank=4, alpha=8)
    tuned = publish("lora", "0b", LoraSettings(**values.model_dump(), lora=adapters), base)
    names = ("choice", "text")
    here = {n: run_task(own_model(path, tokenizer_dir), Task(name=n), directories=[tasks])[n] for n in names}
    plain = run_task(own_model(base, tokenizer_dir), Task(name="text"), directories=[tasks])["text"]
    assert here["text"]["bits_per_byte"] != pytest.approx(plain["bits_per_byte"], rel=1e-2)

    export_checkpoint(base, tasks / "hf/one")
    export_checkpoint(path, tasks / "hf/lora", base=str(tasks / "hf/one"))
    check_equal(here, results_of(hf_model(tasks / "hf/one", peft=tasks / "hf/lora"), tasks, names))

    publish("lora_merged", "0c", values)  # whose weights are replaced by those of base and adapters
    tuned.load_base(base)
    lora.merge(tuned.model)
    whole = Version(tasks / "ckpt/lora_merged")
    shutil.rmtree(whole.iteration_directory(1))
    Saver.configured(run).save(
        whole.directory, 1, lora.Part(tuned.model, adapters=False), None, {"iteration": 1}
    )
    export_checkpoint(whole.directory, tasks / "hf/lora_merged")
    check_equal(here, results_of(hf_model(tasks / "hf/lora_merged"), tasks, names))
