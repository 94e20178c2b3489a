"""What differs between a machine with a GPU and one without."""

import os
import subprocess
import sys

from snaketron.config import Cluster, Model, Optimizer, Parallel
from snaketron.log import UserError
from snaketron.model import backend, spec
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
    run = RunSettings(
        tracking="off",
        offload_optimizer=0.5,
        recompute=["layernorm"],
        cuda_graphs=True,
        moe_token_dispatcher="deepep",
        moe_shared_expert_overlap=True,
        parallel=Parallel(expert_model_parallel_size=2, expert_tensor_parallel_size=2),
    )
    with pytest.raises(UserError) as refused:
        backend.check(model, run, Optimizer(moment_precision="bf16"))
    assert str(refused.value).splitlines() == [
        f"{key} needs a GPU, and this machine has none"
        for key in (
            "parallel.expert_tensor_parallel_size: 2 beside expert_model_parallel_size 2",
            "model.precision: nvfp4",
            "optimizer.moment_precision: bf16",
            "cuda_graphs: True",
            "offload_optimizer: 0.5",
            "recompute: layernorm",
            "moe_token_dispatcher: deepep",
            "moe_shared_expert_overlap: True",
        )
    ]
    backend.check(Model(precision="bf16"), RunSettings(tracking="off"), Optimizer(gradient_precision="bf16"))
    backend.check(Model(), RunSettings(tracking="off", offload_optimizer=0.5))  # a model that is not trained


@pytest.mark.parametrize(
    ("dispatcher", "package"),
    [("deepep", "deep_ep, which"), ("hybridep", "deep_ep of the branch hybrid-ep,")],
)
def test_a_dispatcher_whose_package_is_absent_is_named_and_reaches_megatron_core(dispatcher, package):
    """No machine of the tests has it. megatron-core checks the rest of the combination."""
    run = RunSettings(tracking="off", moe_token_dispatcher=dispatcher)
    assert f"moe_token_dispatcher: {dispatcher} needs the package {package}" in backend.absent_dispatcher(run)
    model = Model(precision="bf16")
    config = spec.transformer_config(model, run.parallel, **spec.dispatching(model, run, Cluster()))
    chosen = config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend
    assert chosen == ("flex", dispatcher)


def test_the_dispatcher_that_the_program_chooses_reaches_megatron_core():
    for processes, chosen in ((1, "alltoall"), (2, "allgather")):
        parallel = Parallel(expert_model_parallel_size=processes, data_parallel_size=processes)
        run = RunSettings(tracking="off", parallel=parallel)
        assert backend.absent_dispatcher(run) == ""
        config = spec.transformer_config(Model(), parallel, **spec.dispatching(Model(), run, Cluster()))
        assert (config.moe_token_dispatcher_type, config.moe_shared_expert_overlap) == (chosen, False)
