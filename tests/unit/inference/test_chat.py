"""Conversations with a model that was never trained; its tokenizer knows a few words."""

from __future__ import annotations

from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.chats.mask import end_of_turn
from snaketron.data.chats.template import load_template
from snaketron.data.tokenizer import load_tokenizer
from snaketron.inference.chat import Chat
from snaketron.inference.decoder import decoding
from snaketron.log import UserError
from snaketron.model.build import build_model

import pytest

TEMPLATE = load_template(Path(__file__).parents[3] / "config/chat_template.jinja")


@pytest.fixture
def chat(settings, tokenizer_dir: Path):
    """chat(length, keys of Chat) in a model of so many tokens."""
    tokenizer = load_tokenizer(tokenizer_dir)
    built = build_model(*settings(seq_length=256), 300)
    with decoding(built, 1, 256) as decoder:

        def make(**keys) -> Chat:
            decoder.forget(0)
            given = {"stop": [tokenizer.token_to_id("<|im_end|>")], "max_tokens": 6} | keys
            return Chat(decoder=decoder, template=TEMPLATE, tokenizer=tokenizer, **given)

        yield make


def test_an_answer_ends_with_the_token_that_tuning_trains(tokenizer_dir: Path):
    tokenizer = load_tokenizer(tokenizer_dir)
    assert end_of_turn(TEMPLATE, tokenizer) == tokenizer.token_to_id("<|im_end|>")


def test_a_second_turn_answers_the_whole_conversation(chat):
    """The decoder goes on from what it has read; a new one that reads all says the same."""
    talk = chat(system="be brief")
    first = "".join(talk.say("the fox"))
    second = "".join(talk.say("the dog"))
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in talk.messages[2::2]] == [first, second]
    again = chat(system="be brief")
    again.messages = talk.messages[:3]
    assert "".join(again.say("the dog")) == second


def test_reset_begins_anew(chat):
    talk = chat()
    first = list(talk.say("the fox"))
    list(talk.say("the dog"))
    talk.reset()
    assert talk.messages == []
    assert list(talk.say("the fox")) == first


def test_what_is_said_until_an_answer_is_stopped_is_kept(chat):
    talk = chat()
    answer = talk.say("the fox")
    piece = next(answer)
    answer.close()
    assert talk.messages[1]["content"] == piece


def test_a_control_token_is_refused(chat):
    talk = chat()
    with pytest.raises(UserError, match=r"<\|im_end\|> is a control token"):
        list(talk.say("the <|im_end|> fox"))
    assert talk.messages == []


def test_a_conversation_that_is_too_long_is_refused_and_can_go_on_shorter(chat):
    talk = chat()
    with pytest.raises(UserError, match=r"trained on up to 256; /reset"):
        list(talk.say("the quick brown fox " * 99))
    assert talk.messages == []
    assert list(talk.say("the fox"))


def test_thoughts_are_apart_from_the_answer():
    answer = Chat._answer("so it is 4\n</think>\n\nIt is 4.", thinking=True)
    assert answer == {"role": "assistant", "content": "It is 4.", "reasoning_content": "so it is 4"}
    assert Chat._answer("<think>\na\n</think>\n\nb", thinking=False)["reasoning_content"] == "a"
    assert "reasoning_content" not in Chat._answer("It is 4.", thinking=False)


def test_calls_are_found(chat):
    talk = chat()
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    talk.messages = [{"role": "assistant", "content": f"{call}\n{call}"}]
    assert talk.calls == ["weather", "weather"]
