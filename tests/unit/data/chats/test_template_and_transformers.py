"""Text, ids and masks of conversations against transformers, and against rendering of prefixes."""

from __future__ import annotations

import random
from typing import Any

from snaketron.data.chats import conversation
from snaketron.data.chats.mask import tokenize
from snaketron.data.chats.template import Template
from tests.unit.data.chats.chat_samples import build_tokenizer
from tests.unit.data.chats.golden import (
    BOTH,
    EACH_CASE,
    SOURCES,
    WEATHER,
    Case,
    assistant,
    call,
    compiled,
    rendered,
    tool,
    user,
)

import numpy as np
import pytest


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import PreTrainedTokenizerFast

    return {
        (name, trim): PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(trim), chat_template=source, bos_token="<|endoftext|>"
        )
        for name, source in SOURCES.items()
        for trim in (False, True)
    }


@pytest.mark.parametrize("trim_offsets", [False, True])
@EACH_CASE
def test_ids_and_mask_are_those_of_transformers(hugging_face, trim_offsets, case):
    theirs = hugging_face["shipped", trim_offsets].apply_chat_template(
        case.messages,
        tools=case.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    made = rendered("shipped", case)
    input_ids, loss_mask = tokenize(build_tokenizer(trim_offsets), made.text, made.spans)
    assert input_ids.dtype == np.int32 and loss_mask.dtype == np.uint8
    assert input_ids.tolist() == theirs["input_ids"]
    assert loss_mask.tolist() == theirs["assistant_masks"]


def by_prefixes(tokenizer: Any, case: Case, **arguments: Any) -> list[tuple[int, int]]:
    """Spans from rendering each prefix with transformers.

    An answer begins where its prompt ends, and ends with the prefix that has it, but for white space. Answers
    before the last message of the user are left out where the history is shortened.
    """
    found = conversation.conversation(case.messages, case.tools)
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in found.messages]
    shortened = arguments.get("truncate_history_thinking", True)
    after = max(i for i, m in enumerate(messages) if m["role"] == "user") if shortened else -1

    def text(upto: int, thinks: bool, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto],
            tools=found.tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **{"enable_thinking": thinks} | arguments,
        )

    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > after:
            thinks = "reasoning_content" in message
            prompt, whole = text(i, thinks, True) if i else None, text(i + 1, thinks, False)
            if prompt is not None:
                assert whole.startswith(prompt)
                spans.append((len(prompt), len(whole.rstrip())))
    return spans


@pytest.mark.parametrize("shortened", [True, False])
@EACH_CASE
def test_spans_without_generation_blocks_are_those_of_prefix_rendering(hugging_face, case, shortened):
    tokenizer = hugging_face["other", False]
    made = rendered("other", case, truncate_history_thinking=shortened)
    expected = by_prefixes(tokenizer, case, truncate_history_thinking=shortened)
    first = {"the assistant begins": 1}.get(case.name, 0)  # nothing is asked before it
    assert expected and made.spans[-len(expected) :] == expected
    if not shortened:
        assert len(made.spans) == len(expected) + first


@EACH_CASE
def test_the_text_without_generation_blocks_is_that_of_transformers(hugging_face, case):
    found = conversation.conversation(case.messages, case.tools)
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in found.messages]
    theirs = hugging_face["other", False].apply_chat_template(messages, tools=found.tools)["input_ids"]
    made = rendered("other", case)
    assert tokenize(build_tokenizer(), made.text, made.spans)[0].tolist() == theirs


def random_case(number: int) -> Case:
    """Turns of any kind one after the other: repeated roles, reasoning here and there, calls and results."""
    draw = random.Random(number)
    words = ["Paris", "two plus two", "é 東京", "  spaced ", "{'a': 1}", "a\nb", "<think>", "end."]
    messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 5)):
        messages += [user(draw.choice(words)) for _ in range(draw.choice((1, 1, 1, 2)))]
        for _ in range(draw.choice((0, 0, 1, 2))):
            arguments = draw.choice(({}, {"city": draw.choice(words)}, '{"n": [1, 2.5, null]}'))
            calls = [call(arguments) for _ in range(draw.randint(1, 2))]
            messages.append(assistant(draw.choice(("", *words)), tool_calls=calls))
            messages += [tool(draw.choice(words)) for _ in calls]
        messages.append(assistant(draw.choice(words)))
        for message in messages:
            if message["role"] == "assistant" and "reasoning_content" not in message and draw.random() < 0.4:
                message["reasoning_content"] = draw.choice(words)
    return Case(f"random {number}", messages, "", "", [WEATHER] if draw.random() < 0.5 else None)


@pytest.mark.parametrize("shortened", [True, False])
def test_random_conversations_have_the_spans_of_prefix_rendering(hugging_face, shortened):
    tokenizer = hugging_face["other", False]
    template = compiled("other", truncate_history_thinking=shortened)
    for number in range(150):
        case = random_case(number)
        found = conversation.conversation(case.messages, case.tools)
        made = template.render(found.messages, found.tools)
        expected = by_prefixes(tokenizer, case, truncate_history_thinking=shortened)
        assert made.spans[-len(expected) :] == expected
        assert shortened or len(made.spans) == len(expected)
        template.check(found.messages, found.tools, None, made)


def test_random_conversations_have_the_ids_and_masks_of_transformers(hugging_face):
    template, tokenizer = compiled("shipped"), build_tokenizer()
    for number in range(150):
        case = random_case(number)
        found = conversation.conversation(case.messages, case.tools)
        theirs = hugging_face["shipped", False].apply_chat_template(
            found.messages,
            tools=found.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        made = template.render(found.messages, found.tools)
        input_ids, loss_mask = tokenize(tokenizer, made.text, made.spans)
        assert input_ids.tolist() == theirs["input_ids"]
        assert loss_mask.tolist() == theirs["assistant_masks"]


@BOTH
@pytest.mark.parametrize("thinks", [False, True])
def test_the_prompt_for_an_answer_is_the_start_of_the_training_text(hugging_face, name, thinks):
    """At inference the model continues from exactly the ids that it was trained to continue."""
    messages = [user("What is two?"), assistant("Two.", **({"reasoning_content": "Hm."} if thinks else {}))]
    prompt = hugging_face[name, False].apply_chat_template(
        messages[:1], add_generation_prompt=True, enable_thinking=thinks
    )["input_ids"]
    made = compiled(name).render(messages, None, {"enable_thinking": thinks})
    input_ids, loss_mask = tokenize(build_tokenizer(), made.text, made.spans)
    assert input_ids[: len(prompt)].tolist() == prompt
    assert loss_mask.argmax() == len(prompt)


KEEPS_SPACES = (
    "{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content + '|' }}{% endgeneration %}"
    "{% endfor %}"
)


@pytest.mark.parametrize("begun", ["The answer is", "Well, ", "x\n", "two  words"])
@pytest.mark.parametrize("source", [*SOURCES.values(), KEEPS_SPACES], ids=[*SOURCES, "keeps spaces"])
def test_an_answer_that_is_begun_goes_on_where_transformers_goes_on(hugging_face, source, begun):
    messages = [user("What is two?"), assistant(begun)]
    theirs = hugging_face["other", False].apply_chat_template(
        messages, tokenize=False, continue_final_message=True, chat_template=source
    )
    assert theirs.rstrip().endswith(begun.rstrip())
    assert Template(source, variables={"bos_token": "<|endoftext|>"}).begun(messages) == theirs
