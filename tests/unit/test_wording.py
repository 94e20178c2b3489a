"""Numbers as a person reads them."""

from snaketron.wording import (
    binary,
    counted,
    duration,
    ended_with,
    large,
    plural,
    short,
    short_duration,
    size_text,
)

import pytest


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1.0 k"), (1.5e6, "1.5 M"), (123.6e9, "123.6 B"), (2e13, "20.0 T")],
)
def test_large_numbers_have_a_unit(number: float, text: str):
    assert large(number) == text


def test_sizes_are_written_for_people():
    sizes = [0, 999, 1000, 99_400, 999_400, 999_500, 3.4e9, 1.2e13]
    assert [size_text(size) for size in sizes] == [
        *["0 bytes", "999 bytes", "1.0 kB", "99.4 kB", "999 kB", "1.0 MB", "3.4 GB", "12.0 TB"]
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (999, "999"), (1200, "1.2 k"), (2_500_000, "2.5 M"), (3e9, "3 B"), (1e12, "1 T")],
)
def test_numbers_of_an_axis(value, text):
    assert short(value) == text


def test_powers_of_two_of_an_axis():
    assert [binary(1 << k) for k in (0, 9, 10, 15, 20, 31)] == [
        "1",
        "512",
        "1 Ki",
        "32 Ki",
        "1 Mi",
        "2 Gi",
    ]


def test_times_that_are_left_and_times_that_are_estimated():
    assert [duration(seconds) for seconds in (0, 59.6, 93_784)] == ["00:00:00", "00:01:00", "26:03:04"]
    short = [short_duration(seconds) for seconds in (2.4, 59, 60)]
    assert short == ["2.4 s", "59 s", "1.0 min"]  # and not "0.0 min"
    hours = [short_duration(3600 * number) for number in (0.5, 1, 47.9, 48)]
    assert hours == ["30.0 min", "1.0 h", "47.9 h", "2.0 days"]


def test_a_number_of_things():
    assert [plural(1, "GPU"), plural(8, "GPU"), plural(2, "process")] == ["1 GPU", "8 GPUs", "2 processes"]


def test_counts_by_reason_leave_out_reasons_that_never_hold():
    assert counted({"empty": 3, "bad row": 0, "too long": 1}) == "3 x empty, 1 x too long"
    assert counted({"empty": 3}, sign=" ") == "3 empty"
    assert (counted({}), counted({"empty": 0}, empty="nothing")) == ("none", "nothing")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-9, "was killed by SIGKILL (out of memory?)"),
        (137, "was killed by SIGKILL (out of memory?)"),
        (-11, "was killed by SIGSEGV"),
        (3, "ended with status 3"),
    ],
)
def test_how_a_process_ended_in_words(status: int, words: str):
    assert ended_with(status) == words
