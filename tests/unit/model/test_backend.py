"""What differs between a machine with a GPU and one without."""

import os
import subprocess
import sys

from snaketron.config import Model, Optimizer
from snaketron.log import UserError
from snaketron.model import backend
from snaketron.settings.training import RunSettings
from tests.conftest import REPOSITORY

import pytest

pytestmark = pytest.mark.skipif(backend.HAS_GPU, reason="what a machine without a GPU refuses")


def test_packages_of_the_gpu_are_left_alone_on_a_machine_without_one(tmp_path):
    """A login node has the environment of the GPU nodes."""
    for package in ("transformer_engine", "mamba_ssm", "causal_conv1d"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise OSError('libcuda.so.1 is not there')")
    code = "from snaketron.model import spec; print(spec.transformer_config.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY / 'scripts'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "transformer_config\n", done.stderr


def test_what_needs_a_gpu_is_refused_without_one():
    model = Model(precision="nvfp4")
    run = RunSettings(tracking="off", offload_optimizer=0.5, recompute=["layernorm"], cuda_graphs=True)
    with pytest.raises(UserError) as refused:
        backend.check(model, run, Optimizer(moment_precision="bf16"))
    assert str(refused.value).splitlines() == [
        f"{key} needs a GPU, and this machine has none"
        for key in (
            "model.precision: nvfp4",
            "optimizer.moment_precision: bf16",
            "cuda_graphs: True",
            "offload_optimizer: 0.5",
            "recompute: layernorm",
        )
    ]
    backend.check(Model(precision="bf16"), RunSettings(tracking="off"), Optimizer(gradient_precision="bf16"))
    backend.check(Model(), RunSettings(tracking="off", offload_optimizer=0.5))  # a model that is not trained
