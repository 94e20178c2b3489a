"""A chat template is checked before it is put beside the tokenizer."""

from __future__ import annotations

import re
import resource
import shutil
import signal
from pathlib import Path

from snaketron import files
from snaketron.data.chats import install
from snaketron.data.chats.install import install_template
from snaketron.log import UserError
from snaketron.settings.tokenizer import TemplateSettings

import pytest

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def template_outputs(tmp_path: Path) -> list:
    return [
        "--output",
        tmp_path / "out" / "chat_template.jinja",
        "--record",
        tmp_path / "out" / "template.json",
    ]


def test_a_template_is_checked_and_copied(run_script, tmp_path, template_outputs):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    settings = TemplateSettings(chat_template=str(tmp_path / "chat.jinja")).model_dump_json()
    status, stderr = run_script("install_chat_template", "--settings", settings, *template_outputs)
    assert status == 0, stderr
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert files.read_json(tmp_path / "out" / "template.json")["counts"] == {"characters": len(TEMPLATE)}


def test_the_template_of_a_tokenizer_is_taken(run_script, tmp_path, tokenizer_dir, template_outputs):
    source = Path(shutil.copytree(tokenizer_dir, tmp_path / "hf"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    settings = TemplateSettings(path=str(source)).model_dump_json()
    status, stderr = run_script("install_chat_template", "--settings", settings, *template_outputs)
    assert status == 0, stderr
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat.jinja: no such chat template (tokenizer.chat_template)"),
        ("{% for m in messages %}", "chat.jinja:1: the chat template does not parse"),
        ("{{ raise_exception('no roles') }}{% generation %}{% endgeneration %}", "no roles"),
        (
            "{% for m in [1] %}{{ messages[0].content }}{{ messages[1].content }}{% endfor %}",
            "{% generation %}",
        ),
        (
            "{% generation %}It is 4.{% endgeneration %}",
            "the template leaves out a message: the content of message 0",
        ),
        (
            TEMPLATE.replace("{{ m.content }}<|im_end|>{% endg", "{% endg"),
            "the template leaves out a message: the content of message 1",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}!{% endgeneration %}",
            "the assistant's answer is outside {% generation %}",
        ),
    ],
)
def test_a_template_that_would_train_on_nothing_is_refused(
    run_script, tmp_path, template_outputs, template, message
):
    path = tmp_path / "chat.jinja"
    if template is not None:
        path.write_text(template)
    settings = TemplateSettings(chat_template=str(path)).model_dump_json()
    status, stderr = run_script("install_chat_template", "--settings", settings, *template_outputs)
    assert (status, message in stderr) == (1, True), stderr
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("greedy", "said"),
    [
        ('{{ "a" * 10 ** 10 }}', "chat.jinja: takes more than 1 GB of memory for a question and an answer"),
        ("{{ messages[0].content|center(10 ** 10) }}", "chat.jinja: takes more than 1 GB of memory"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "chat.jinja: takes more than 0.5 s for a question and an answer",
        ),
    ],
)
def test_a_template_that_takes_all_memory_or_no_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, greedy: str, said: str
):
    if "range" in greedy:
        monkeypatch.setattr(install, "PATIENCE_S", 0.5)
    (tmp_path / "chat.jinja").write_text(greedy + TEMPLATE)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(UserError, match=re.escape(said)):
        install_template(
            TemplateSettings(chat_template=str(tmp_path / "chat.jinja")),
            output=tmp_path / "out/chat_template.jinja",
            record=tmp_path / "out/template.json",
        )
    assert files_in(tmp_path / "out") == []
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_tokenizer_without_a_template_says_what_to_do(
    run_script, tmp_path, tokenizer_dir, template_outputs
):
    source = Path(shutil.copytree(tokenizer_dir, tmp_path / "hf"))
    settings = TemplateSettings(path=str(source)).model_dump_json()
    status, stderr = run_script("install_chat_template", "--settings", settings, *template_outputs)
    assert (status, "no chat template; set tokenizer.chat_template" in stderr) == (1, True), stderr
