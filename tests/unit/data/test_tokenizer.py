"""A tokenizer from text or from Hugging Face gives the same files, which `transformers` reads too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from snaketron import files
from snaketron.data import tokenizer
from snaketron.log import UserError
from snaketron.settings.tokenizer import TokenizerSettings

import pytest
from transformers import AutoTokenizer

STRANGE = "Tabs\t  and   spaces, 1234.5 numbers; é, 漢字, 🐍\r\n\n\tdef f(x): don't </think>x<|im_end|>"


@pytest.fixture
def outputs(tmp_path: Path) -> list:
    return ["--output", tmp_path / "out" / "tokenizer.json", "--record", tmp_path / "out" / "record.json"]


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------ training


def test_special_tokens_come_first_and_every_byte_has_a_token(tokenizer_dir):
    loaded = tokenizer.load_tokenizer(tokenizer_dir)
    assert [loaded.id_to_token(i) for i in range(12)] == list(tokenizer.SPECIAL_TOKENS)
    assert loaded.get_vocab_size() == 300
    assert loaded.decode(loaded.encode(STRANGE).ids, skip_special_tokens=False) == STRANGE
    assert loaded.encode("2026").tokens == ["2", "0", "2", "6"]
    assert loaded.encode("a</think>").ids[-1] == loaded.token_to_id("</think>")


def test_info_holds_what_the_stages_need(tokenizer_dir):
    assert tokenizer.tokenizer_info(tokenizer_dir) == tokenizer.Info(
        sha256=files.sha256(tokenizer_dir / "tokenizer.json"),
        vocab_size=300,
        eos_token="<|endoftext|>",
        eos_id=0,
        pad_id=1,
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "uint16"), (65536, "uint16"), (65537, "int32")])
def test_uint16_holds_ids_up_to_65535(vocab_size, dtype):
    assert tokenizer.Info("", vocab_size, "e", 0, 0).dtype == dtype


def test_transformers_reads_the_directory_and_gives_equal_ids(tokenizer_dir):
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert theirs.encode(STRANGE) == tokenizer.load_tokenizer(tokenizer_dir).encode(STRANGE).ids
    assert (theirs.eos_token, theirs.pad_token, len(theirs)) == ("<|endoftext|>", "<|pad|>", 300)


def test_training_again_gives_the_same_tokenizer(run_script, tmp_path, write_jsonl, outputs):
    text = write_jsonl(
        tmp_path / "a.jsonl", [{"body": f"some text {i % 7} again and again"} for i in range(99)]
    )
    identities = []
    for _ in range(2):
        settings = '{"vocab_size": 280, "text_field": "body"}'
        status, stderr = run_script("build_tokenizer", "--settings", settings, "--text", text, *outputs)
        assert status == 0, stderr
        record = files.read_json(tmp_path / "out" / "record.json")
        identities.append(record["outputs"][0]["sha256"])
    assert identities[0] == identities[1] == tokenizer.tokenizer_info(tmp_path / "out").sha256
    assert record["counts"] == {"vocab_size": 280}
    assert record["inputs"] == [{"name": "text", "path": str(text), "sha256": files.sha256(text)}]
    assert files_in(tmp_path / "out") == ["record.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(
    ("rows", "vocab_size", "message"),
    [
        (
            [{"text": "a"}],
            267,
            "vocab_size 267 has no room for 256 bytes and 12 special tokens; give at least 268",
        ),
        ([], 300, "tokenizer.text holds no documents"),
        ([{"text": "a"}, {"body": "a"}], 300, "a.jsonl:2: no field 'text'; the fields are 'body'"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(
    run_script, tmp_path, write_jsonl, outputs, rows, vocab_size, message
):
    text = write_jsonl(tmp_path / "a.jsonl", rows)
    settings = TokenizerSettings(vocab_size=vocab_size, text_field="text").model_dump_json()
    status, stderr = run_script("build_tokenizer", "--settings", settings, "--text", text, *outputs)
    assert (status, message in stderr) == (1, True), stderr
    assert files_in(tmp_path / "out") == []


def test_bad_rows_of_its_text_are_dropped_where_the_configuration_says_so(
    run_script, tmp_path, write_jsonl, outputs
):
    """The advice of the error works: a tokenizer reads its text as a corpus does, and tells the drops."""
    good = [{"text": f"some text {i % 7} again"} for i in range(98)]
    clean = write_jsonl(tmp_path / "clean.jsonl", good)
    text = write_jsonl(tmp_path / "a.jsonl", [*good[:3], {"text": None}, *good[3:], {"text": None}])

    def train(path: Path, **reading: object) -> tuple[int, str]:
        settings = TokenizerSettings(vocab_size=280, text_field="text").model_dump_json()
        options = ("--settings", settings, "--reading", json.dumps(reading))
        return run_script("build_tokenizer", "--text", path, *options, *outputs)

    status, stderr = train(text)
    assert status == 1 and "a.jsonl:4: field 'text' is null, not text" in stderr
    assert "correct or remove the row; or set pretrain_data.bad_rows to drop" in stderr
    status, stderr = train(text, bad_rows="drop")
    assert status == 1 and files_in(tmp_path / "out") == []
    assert "2 of 100 rows are bad or invalid, more than pretrain_data.max_dropped_fraction 0.01" in stderr
    status, stderr = train(text, bad_rows="drop", max_dropped_fraction=0.02)
    assert status == 0 and "tokenizer.text: dropped 2 of 100 rows (2 x bad row)" in stderr
    counts = files.read_json(tmp_path / "out" / "record.json")["counts"]
    assert counts["dropped"] == {"bad row": 2} and [row["row"] for row in counts["dropped_rows"]] == [4, 100]
    made = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert train(clean)[0] == 0 and (tmp_path / "out" / "tokenizer.json").read_bytes() == made


def test_less_text_than_the_vocabulary_needs_is_a_warning(caplog):
    assert tokenizer.train(["ab ab"], 1000).get_vocab_size() < 1000
    assert "of 1000 tokens" in caplog.text


# -------------------------------------------------------------------------------------- Hugging Face


def copy_of(tokenizer_dir: Path, directory: Path, **config: object) -> Path:
    """A tokenizer directory as others make it, with `config` changed in tokenizer_config.json."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    changed = {**files.read_json(tokenizer_dir / "tokenizer_config.json"), **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(changed))
    return directory


def test_a_local_tokenizer_is_taken_over(run_script, tmp_path, tokenizer_dir, outputs):
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
    source = copy_of(tokenizer_dir, tmp_path / "hf", eos_token=eos, pad_token=None, chat_template="{{ 1 }}")
    settings = TokenizerSettings(path=str(source)).model_dump_json()
    status, stderr = run_script("build_tokenizer", "--settings", settings, "--text", *outputs)
    assert status == 0, stderr
    info = tokenizer.tokenizer_info(tmp_path / "out")
    assert (info.eos_token, info.eos_id, info.pad_id) == ("<|im_end|>", 3, 3)
    ids = tokenizer.load_tokenizer(tmp_path / "out").encode(STRANGE).ids
    assert ids == tokenizer.load_tokenizer(tokenizer_dir).encode(STRANGE).ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    inputs = files.read_json(tmp_path / "out" / "record.json")["inputs"]
    assert [i["path"] for i in inputs] == [
        str(source / "tokenizer.json"),
        str(source / "tokenizer_config.json"),
    ]


def no_tokenizer(tmp_path: Path, _: Path) -> Path:
    (tmp_path / "hf").mkdir()
    return tmp_path / "hf"


def slow_tokenizer(tmp_path: Path, _: Path) -> Path:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "vocab.json").write_text('{"a": 0, "<unk>": 1}')
    (tmp_path / "hf" / "merges.txt").write_text("#version\n")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"tokenizer_class": "CTRLTokenizer"}')
    return tmp_path / "hf"


def no_end(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return copy_of(tokenizer_dir, tmp_path / "hf", eos_token=None)


def no_object(name: str) -> Callable[[Path, Path], Path]:
    """A tokenizer one of whose files is a list."""

    def make(tmp_path: Path, tokenizer_dir: Path) -> Path:
        directory = copy_of(tokenizer_dir, tmp_path / "hf")
        (directory / name).write_text("[1]")
        return directory

    return make


def pointer(tmp_path: Path, tokenizer_dir: Path) -> Path:
    directory = copy_of(tokenizer_dir, tmp_path / "hf")
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tmp_path, _: tmp_path / "none" / "such", "none/such: no such directory"),
        (no_tokenizer, "no tokenizer in this directory"),
        (slow_tokenizer, "CTRLTokenizer has no fast version"),
        (no_end, "no eos_token"),
        (no_object("tokenizer.json"), "no tokenizer in this directory"),
        (no_object("tokenizer_config.json"), "no tokenizer in this directory"),
        (pointer, "no tokenizer in this directory (tokenizer.json is a pointer of Git LFS; fetch the file"),
        (
            lambda tmp_path, of: copy_of(of, tmp_path / "hf", eos_token=["a"]),
            "no tokenizer in this directory",
        ),
        (lambda *_: "gpt2", "gpt2: no such directory (a tokenizer of the hub is named as OWNER/NAME or "),
    ],
)
def test_a_tokenizer_that_cannot_be_used(run_script, tmp_path, tokenizer_dir, outputs, make, message):
    settings = TokenizerSettings(path=str(make(tmp_path, tokenizer_dir))).model_dump_json()
    status, stderr = run_script("build_tokenizer", "--settings", settings, *outputs)
    assert (status, message in stderr, stderr.count("\n")) == (1, True, 1), stderr
    assert files_in(tmp_path / "out") == []


def test_info_of_an_unusable_directory(tmp_path, tokenizer_dir):
    with pytest.raises(UserError, match=r"tokenizer.json: no such file; build the tokenizer first"):
        tokenizer.tokenizer_info(tmp_path)
    with pytest.raises(UserError, match="no end-of-document token"):
        tokenizer.tokenizer_info(copy_of(tokenizer_dir, tmp_path / "a", eos_token="<|unknown|>"))
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        tokenizer.tokenizer_info(tmp_path / "a")
