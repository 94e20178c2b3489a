"""What was published or measured, and what is worked out for it."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.sizes import measured
from snaketron.sizes.published import compare

import pytest
import yaml

CONFIG = Path(__file__).parents[3] / "config"
BOTH = [load(yaml.safe_load((CONFIG / f"{name}.yaml").read_text()), {}) for name in ("super", "nano")]


@pytest.mark.parametrize("number", compare(*BOTH), ids=lambda number: number.what)
def test_estimates_agree_with_what_was_published(number):
    assert number.estimate == pytest.approx(number.published, rel=number.tolerance, abs=0)


def test_the_parameters_are_those_of_the_checkpoint_to_the_last_one():
    first, *_ = compare(*BOTH)
    assert first.published == first.estimate == 123_611_012_096


@pytest.mark.parametrize(
    ("written", "misspelt"), [("graphs: true", "graph: true"), ("mtp_num_layers: 1", "mtp_layers: 1")]
)
def test_a_misspelt_key_of_a_measurement_is_an_error(
    monkeypatch, tmp_path: Path, written: str, misspelt: str
):
    """It was passed over, and the estimate was that of another training."""
    text = Path(measured.__file__).with_suffix(".yaml").read_text()
    assert written in text
    (tmp_path / "measured.yaml").write_text(text.replace(written, misspelt, 1))
    monkeypatch.setattr(measured, "__file__", str(tmp_path / "measured.py"))
    with pytest.raises(ValueError, match=misspelt.partition(":")[0]):
        measured.points(*(config.model for config in BOTH))
