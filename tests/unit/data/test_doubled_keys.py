"""A key that stands twice in an object of JSON is found, however it is written."""

from __future__ import annotations

import json
from pathlib import Path

from snaketron.data.doubled_keys import DoubledKey, loads, may_be_doubled
from snaketron.data.drops import Drops
from snaketron.data.rows import read_rows
from snaketron.log import UserError
from snaketron.settings.text import ReadSettings

import orjson
import pytest

DOUBLED = [
    r'{"text":1,"text":2}',
    r'{"text":1,"text":1}',
    r'{"text" :1,"text":2}',
    '{"text":1,"text" \t :2}',
    r'{"a":{"b":1,"c":2,"b":3}}',
    r'[{"a":[[{"b":1,"b":2}]]}]',
    r'{"a\\":1,"a\\":2}',
    r'{"a\\\"":1,"a\\\"":2}',
    r'{"text":"x","\u0074ext":"y"}',
    r'{"":1,"":2}',
    r'{"text":":","text":":"}',
]
SINGLE = [
    r'{"text":1}',
    r'{"text" : 1, "other" : {"text" : 2}}',
    r'{"text":"{\"a\":1,\"a\":2}"}',
    r'{"text":"say \\\"a\\\": \\\"a\\\":"}',
    r'{"a\\":1,"b":"\\"}',
    r'[1,"a",null,[],{}]',
    r'"a\":"',
]


@pytest.mark.parametrize("text", DOUBLED)
def test_a_doubled_key_is_never_missed(text):
    assert may_be_doubled(text.encode(), orjson.loads(text))
    with pytest.raises(DoubledKey):
        loads(text)


@pytest.mark.parametrize("text", SINGLE)
def test_what_has_each_key_once_is_read_once(text):
    assert not may_be_doubled(text.encode(), orjson.loads(text))
    assert loads(text) == json.loads(text)


def test_a_text_that_begins_with_a_colon_is_read_twice_and_is_right(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text":":-)"}\n')
    assert [row for _, row in read_rows(tmp_path / "a.jsonl", required=["text"])] == [{"text": ":-)"}]


@pytest.mark.parametrize("number", ["2", "12345678901234567890123"])  # also where integers are kept exact
@pytest.mark.parametrize("exact", [False, True])
def test_such_a_row_is_refused_or_counted(tmp_path: Path, number: str, exact: bool):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text":"a"}}\n{{"text":"b","n":{number},"text":"c"}}\n{{"text":"d"}}\n')
    with pytest.raises(UserError) as error:
        list(read_rows(path, required=["text"], exact=exact))
    expected = "the key 'text' stands twice in one object; remove one of them, because only one can be read"
    assert str(error.value) == f"{path}:2: {expected}; or set pretrain_data.bad_rows to drop"
    settings, drops = ReadSettings(bad_rows="drop", max_dropped_fraction=0.5), Drops()
    rows = read_rows(path, required=["text"], settings=settings, drops=drops, exact=exact)
    assert [row["text"] for _, row in rows] == ["a", "d"]
    assert dict(drops.reasons) == {"bad row": 1}


def test_a_row_with_invalid_text_is_looked_at_too(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"a\xff","text":"b"}\n')
    settings = ReadSettings(invalid_text="replace")
    with pytest.raises(UserError, match="the key 'text' stands twice"):
        list(read_rows(tmp_path / "a.jsonl", required=["text"], settings=settings))
