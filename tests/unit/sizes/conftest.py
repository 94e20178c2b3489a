"""Models that megatron-core builds, to compare with."""

from tests.unit.model.conftest import build, one_process, seeded  # noqa: F401
