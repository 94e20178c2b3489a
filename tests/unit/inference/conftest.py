"""What the tests of trainings have, for a model that only answers."""

from tests.unit.train.conftest import (  # noqa: F401
    log_handlers,
    one_process,
    packed_blend,
    publish,
    seeded,
    settings,
    sft_settings,
    tokenizer_dir,
)
