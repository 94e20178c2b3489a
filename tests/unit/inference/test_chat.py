"""Conversations with a model that was never trained; its tokenizer knows a few words."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.chats.mask import end_of_turn
from snaketron.data.chats.template import load_template
from snaketron.data.tokenizer import load_tokenizer
from snaketron.inference.chat import Chat
from snaketron.inference.conversing import COMMANDS, FAINT, NORMAL, _show, converse
from snaketron.inference.decoder import decoding
from snaketron.log import UserError
from snaketron.model.build import build_model

import pytest
from tokenizers import Tokenizer, decoders, models

REPOSITORY = Path(__file__).parents[3]
TEMPLATE = load_template(REPOSITORY / "config/chat_template.jinja")


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


def test_an_answer_that_was_cut_says_so(chat, capsys, monkeypatch):
    """The model, which was never trained, ends no answer. The last one goes on until 256 tokens are read."""
    talk = chat(max_tokens=1)
    list(talk.say("the fox"))
    assert talk.cut == "cut after 1 token (--max-tokens)"
    lines = iter(["the fox", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    converse(talk)
    assert "… cut after 1 token (--max-tokens)" in capsys.readouterr().out
    talk.stop = range(300)  # any token ends an answer
    list(talk.say("the fox"))
    assert talk.cut == ""
    long = chat(max_tokens=256)
    list(long.say("the fox"))
    prompt = long.tokenizer.encode(TEMPLATE.prompt(long.messages[:1], None, {}), add_special_tokens=False)
    said = f"cut after {257 - len(prompt)} tokens (the model was trained on 256 with the conversation)"
    assert long.cut == said


def test_parts_of_a_character_wait_for_the_rest_and_bytes_that_are_no_text_stop_nothing(chat, monkeypatch):
    """In a tokenizer that spells what it does not know byte by byte; the last answer ends in a character."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "<end>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    talk = chat(stop=[257])
    talk.tokenizer = tokenizer
    smile = list("\U0001f600".encode())
    for answer, pieces in (
        ([*smile, 256, 257], ["\U0001f600a"]),
        ([ord("\n"), 0xFF, 256, 257], ["\ufffd\ufffda"]),
        ([256, *smile[:2]], ["a", "\ufffd\ufffd"]),
    ):
        monkeypatch.setattr("snaketron.inference.chat.continuation", lambda *_, answer=answer, **__: answer)
        talk.reset()
        assert list(talk.say("a")) == pieces
        assert talk.messages[1]["content"] == "".join(pieces)
        assert "".join(pieces) == tokenizer.decode([token for token in answer if token != 257])


def test_what_is_said_until_an_answer_is_stopped_is_kept(chat):
    talk = chat()
    answer = talk.say("the fox")
    piece = next(answer)
    answer.close()
    assert talk.messages[1]["content"] == piece


def test_the_model_forgets_what_it_was_interrupted_at(chat):
    """All layers have read a prompt that was not answered; the next answer is that of a new conversation."""
    talk = chat()
    compute: Any = talk.decoder._direct
    left = 1

    def interrupted(ids):
        nonlocal left
        left -= 1
        logits = compute(ids)
        if not left:
            raise KeyboardInterrupt
        return logits

    talk.decoder._direct = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(talk.say("the fox"))
    answer = "".join(talk.say("the dog"))
    assert int(talk.decoder.lengths[0]) == len(talk._known)  # else attention misses what was not answered
    again = chat()
    again.messages = talk.messages[:2]
    assert "".join(again.say("the dog")) == answer


def test_what_the_tokenizer_cannot_take_is_refused(chat):
    talk = chat()
    with pytest.raises(UserError, match=r"<\|im_end\|> is a control token"):
        list(talk.say("the <|im_end|> fox"))
    with pytest.raises(UserError, match="not valid UTF-8, at character 5"):
        list(talk.say("the \udcff fox"))
    assert talk.messages == []
    for keys in ({"system": "be <|im_end|>"}, {"tools": [{"name": "<|im_end|>"}]}):
        with pytest.raises(UserError, match=r"<\|im_end\|> is a control token"):
            chat(**keys)


def test_what_the_template_refuses_is_said(chat):
    talk = chat()
    with pytest.raises(UserError, match=r"cannot write this conversation: .* none by 'critic'"):
        list(talk.say("the fox", role="critic"))
    assert talk.messages == []


def test_a_conversation_that_is_too_long_is_refused_and_can_go_on_shorter(chat):
    talk = chat()
    with pytest.raises(UserError, match=r"trained on up to 256; begin another one"):
        list(talk.say("the quick brown fox " * 99))
    assert talk.messages == []
    assert list(talk.say("the fox"))


def test_thoughts_are_apart_from_the_answer():
    answer = Chat._answer("so it is 4\n</think>\n\nIt is 4.", thinking=True)
    assert answer == {"role": "assistant", "content": "It is 4.", "reasoning_content": "so it is 4"}
    assert Chat._answer("<think>\na\n</think>\n\nb", thinking=False)["reasoning_content"] == "a"
    assert "reasoning_content" not in Chat._answer("It is 4.", thinking=False)


@pytest.mark.parametrize("opened", [True, False])
def test_thoughts_are_faint_whether_the_prompt_opens_them_or_the_answer(chat, opened, monkeypatch, capsys):
    talk = chat(arguments={"enable_thinking": opened})
    said = ("" if opened else "<think>") + "the fox</think>the dog"
    ids = talk.tokenizer.encode(said, add_special_tokens=False).ids
    monkeypatch.setattr("snaketron.inference.chat.continuation", lambda *_, **__: [*ids, *talk.stop])
    _show(talk, talk.say("why"))
    thought, _, answer = capsys.readouterr().out.partition("</think>")
    assert thought.startswith(FAINT) and "\n" not in thought
    assert "".join(thought.replace(FAINT, "").split(NORMAL)) == said.partition("</think>")[0]
    assert answer == "the dog\n"


def test_calls_are_found(chat):
    talk = chat()
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    talk.messages = [{"role": "assistant", "content": f"{call}\n{call}"}]
    assert talk.calls == ["weather", "weather"]
    talk.messages = [
        {"role": "assistant", "content": "<tool_call>\n<function=weather>\n</function>\n</tool_call>"}
    ]
    assert talk.calls == ["weather"]


def test_a_conversation_goes_on_until_the_user_ends_it(chat, monkeypatch, capsys):
    """Ctrl-C clears a line, and a result that is not given ends the answer."""
    talk = chat(max_tokens=1)
    calls = iter([["weather"], [], []])
    monkeypatch.setattr(Chat, "calls", property(lambda _: next(calls)))
    lines: list[Any] = [KeyboardInterrupt, "the fox", EOFError, "/help", "/nope x", "<|im_end|>", "the dog"]
    lines += ["/reset", "the fox", "/quit"]
    asked = []

    def typed(prompt: str) -> str:
        asked.append(prompt)
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    converse(talk)
    assert asked == ["> ", "> ", "result of weather> ", *7 * ["> "]] and lines == []
    assert [message["content"] for message in talk.messages[::2]] == ["the fox"]
    shown = capsys.readouterr().out
    assert shown.count(COMMANDS) == 2
    assert "/nope is no command; there are /reset, /help and /quit\n" in shown
    assert "<|im_end|> is a control token" in shown


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[1, "a"]', "entry 1 is a number, entry 2 is a text"),
        (
            '[{"type": "function", "function": {"name": "a"}}, {}, null]',
            "entry 2 has no name, entry 3 is null",
        ),
        ('[{"type": "function", "function": {"name": ""}}]', "entry 1 has no name"),
        ('{"name": "weather"}', "a JSON list of function schemas is expected"),
        ("[", "a JSON list of function schemas is expected"),
    ],
)
def test_functions_without_a_name_are_refused(text: str, problem: str, tmp_path: Path):
    tools = runpy.run_path(str(REPOSITORY / "scripts/chat.py"))["_tools"]
    (tmp_path / "tools.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        tools(tmp_path / "tools.json")


def test_a_file_of_functions_that_is_not_there_is_named_once(tmp_path: Path):
    tools = runpy.run_path(str(REPOSITORY / "scripts/chat.py"))["_tools"]
    with pytest.raises(UserError) as refused:
        tools(tmp_path / "none.json")
    said = "No such file or directory; a JSON list of function schemas is expected"
    assert str(refused.value) == f"{tmp_path / 'none.json'}: {said}"


def test_functions_may_stand_in_an_object_or_alone(tmp_path: Path):
    tools = runpy.run_path(str(REPOSITORY / "scripts/chat.py"))["_tools"]
    (tmp_path / "tools.json").write_text('[{"name": "a"}, {"type": "function", "function": {"name": "b"}}]')
    assert tools(tmp_path / "tools.json") == [
        {"name": "a"},
        {"type": "function", "function": {"name": "b"}},
    ]


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--temperature", "-1", "-1 is not a number from 0 on"),
        ("--temperature", "nan", "nan is not a number from 0 on"),
        ("--top-p", "1.5", "1.5 is not a number from 0 to 1"),
        ("--seed", "-1", "-1 is not a whole number from 0 to 2^63 - 1"),
        ("--max-tokens", "0", "0 is not a whole number above 0"),
        ("--threads", "two", "two is not a whole number above 0"),
        ("--template-arguments", "[1]", "'[1]' is no JSON object"),
    ],
)
def test_an_option_that_means_nothing_is_refused(option: str, value: str, problem: str, capsys):
    main = runpy.run_path(str(REPOSITORY / "scripts/chat.py"))["main"]
    with pytest.raises(SystemExit):
        main(["ckpt/sft", f"{option}={value}"])
    assert f"argument {option}: {problem}\n" in capsys.readouterr().err
