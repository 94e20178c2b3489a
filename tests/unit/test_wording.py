"""Numbers as a person reads them."""

from snaketron.wording import large

import pytest


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999"), (1000, "1.0 k"), (1.5e6, "1.5 M"), (123.6e9, "123.6 B"), (2e13, "20.0 T")],
)
def test_large_numbers_have_a_unit(number: float, text: str):
    assert large(number) == text
