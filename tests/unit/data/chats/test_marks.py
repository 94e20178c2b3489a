"""What the assistant writes is found in the output of a template, with generation blocks and without."""

from __future__ import annotations

from snaketron.data.chats.template import Template
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import question
from tests.unit.data.chats.golden import LOOP, PROMPT, assistant, marked

import pytest


def test_spans_are_right_when_the_block_lies_in_a_macro():
    template = Template(
        "{% macro say(m) %}A: {% generation %}{{ m.content }}{% endgeneration %}!{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    made = template.render([assistant("one"), assistant("two")])
    assert marked(made) == "A: ⟦one⟧!A: ⟦two⟧!" and made.owners == [0, 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (LOOP + PROMPT, "<|user|>a<|end|>\n<|assistant|>⟦b<|end|>⟧\n"),
        # a prompt that only other answers have: the text before the answer is what precedes it
        (LOOP + PROMPT.replace("|>{", "|><think>{"), "<|user|>a<|end|>\n<|assistant|>⟦b<|end|>⟧\n"),
        # calls in a loop of their own, and what `continue` leaves out
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% continue %}{% endif %}"
            "<|assistant|>{% for letter in m.content %}{{ letter }}{% endfor %}<|end|>{% endfor %}" + PROMPT,
            "a<|assistant|>⟦b<|end|>⟧",
        ),
        # without a prompt, as Mistral's
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
            "[INST] a [/INST]⟦ b</s>⟧",
        ),
        # the loop over copies of the list, within a condition
        (
            "{% if messages %}{% set rest = messages[1:] %}<|user|>{{ messages[0].content }}<|end|>"
            "{% for m in rest %}<|assistant|>{{ m.content }}<|end|>{% endfor %}{% endif %}" + PROMPT,
            "<|user|>a<|end|><|assistant|>⟦b<|end|>⟧",
        ),
        # the loop over numbers
        (
            "{% for i in range(messages | length) %}<|{{ messages[i].role }}|>{{ messages[i].content }}"
            "<|end|>{% endfor %}" + PROMPT,
            "<|user|>a<|end|><|assistant|>⟦b<|end|>⟧",
        ),
        # the last answer ends only where another one is asked for
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{{ '<|end|>' if not loop.last or add_generation_prompt }}{% endfor %}" + PROMPT,
            "<|user|>a<|end|><|assistant|>⟦b<|end|>⟧",
        ),
    ],
)
def test_what_the_assistant_writes_is_found(source, expected):
    assert marked(Template(source).render(question("a", "b"))) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[1].content }}<|end|>", "leaves out a message"),
        (
            "{% for i in range(2) %}{{ (messages | list)[i].content }}<|end|>{% endfor %}",
            "leaves out a message",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "ends the assistant's turn with nothing",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}<|end|>{% endfor %}",
            "changes what the assistant says",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% for n in messages %}{{ n.role }}{% endfor %}"
            "<|end|>{% endfor %}",
            "other messages stand within",
        ),
    ],
)
def test_a_template_in_which_it_cannot_be_told_is_refused(source, message):
    with pytest.raises(UserError, match=f"^my.jinja: .*{message}") as caught:
        Template(source, name="my.jinja")
    assert "{% generation %}" in str(caught.value)
