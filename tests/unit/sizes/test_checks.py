"""Trainings that do not fit the GPUs, and adapters that do not fit the model."""

from snaketron.config import ConfigError, load
from snaketron.sizes.checks import check_requested, check_trainings
from snaketron.sizes.limits import Limits
from tests.unit.sizes.models import COUNTED

import pytest


def test_a_training_that_no_gpu_holds_is_refused_with_both_numbers():
    """1.8 M parameters of 4 + 4 + 8 bytes are 29 MB, and the activations of 4 sequences 89 MB more."""
    config = load(COUNTED | {"cluster": {"gpus_per_node": 1, "gpu_memory_gb": 0.1}}, {})
    message = (
        r"pretrain.parallel: takes 0.11\d+ GB of a GPU, more than cluster.gpu_memory_gb 0.1, of which "
        r"weights, gradients and optimizer take 0.029\d+; the smallest change that fits \(0.073\d+ GB\): "
        r"pretrain.micro_batch_size: 2"
    )
    with pytest.raises(ConfigError, match=message):
        check_trainings(config)
    check_trainings(load(COUNTED | {"cluster": {"gpus_per_node": 1, "gpu_memory_gb": 0.12}}, {}))
    check_trainings(load(COUNTED | {"cluster": {"gpus_per_node": 0, "gpu_memory_gb": 0.1}}, {}))  # on CPUs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (  # of dense layers, which the default model has none of
            {"lora": {"target_modules": ["in_proj", "mlp.linear_fc1"]}},
            "lora.target_modules[1]: 'mlp.linear_fc1' is no linear layer of this model; "
            "did you mean 'linear_fc1'?",
        ),
        (  # MEM*|EME, with multi-token prediction at the end
            {
                "model": {"hybrid_layer_pattern": "MEM*EME"},
                "lora": {"target_modules": ["eh_proj"], "parallel": {"pipeline_model_parallel_size": 2}},
            },
            "lora.target_modules: none of the layers MEM* of pipeline stage 0 is meant; "
            "add a target that it has, such as in_proj",
        ),
        (  # MM*|EEE
            {
                "model": {"hybrid_layer_pattern": "MM*EEE", "mtp_num_layers": 0},
                "tokenizer": {"vocab_size": 32768},
                "lora": {"target_modules": ["in_proj"], "parallel": {"pipeline_model_parallel_size": 2}},
            },
            "lora.target_modules: none of the layers EEE of pipeline stage 1 is meant; "
            "add a target that it has, such as router",
        ),
        (
            {"cluster": {"gpus_per_node": 1, "gpu_memory_gb": 0.001}},
            "lora.parallel: takes 0.0",
        ),
    ],
)
def test_lora_that_cannot_be_is_an_error_when_it_is_asked_for(values: dict, message: str):
    config = load(values, {})
    with pytest.raises(ConfigError) as error:
        check_requested(config, config.training("lora"), Limits())
    assert str(error.value).startswith(message)


def test_what_lora_cannot_adapt_does_not_concern_the_others():
    """A model without attention has no linear_qkv, which is a target by default."""
    config = load({"model": {"hybrid_layer_pattern": "MEME", "mtp_num_layers": 0}}, {})
    check_trainings(config)
    with pytest.raises(ConfigError, match=r"target_modules\[0\]: 'linear_qkv' is no linear layer"):
        check_requested(config, config.training("lora"), Limits())


def test_phases_that_share_their_parallel_sizes_are_one_problem_of_the_largest():
    """The second phase has sequences twice as long, so its number is told, once."""
    mix = [{"corpus": "docs", "weight": 1}]
    phases = [
        {"name": "short", "tokens": 300_000, "blend": mix},
        {"name": "long", "tokens": 300_000, "blend": mix, "seq_length": 512},
    ]
    config = load(
        COUNTED | {"cluster": {"gpus_per_node": 1, "gpu_memory_gb": 0.1}, "pretrain": {"phases": phases}},
        {},
    )
    with pytest.raises(ConfigError) as error:
        check_trainings(config)
    (of_pretrain, *_) = problems = str(error.value).splitlines()
    assert of_pretrain.startswith("pretrain.parallel: takes 0.207")
    assert sum(problem.startswith("pretrain") for problem in problems) == 1


FP8 = {"precision": "fp8_current", "mamba_num_heads": 16, "mamba_head_dim": 16}
OF_GPUS = {  # beside which trainings on CPUs are asked for
    "model": FP8,
    "pretrain": {"cuda_graphs": True, "global_batch_size": 16},
    "sft": {"precision": "bf16", "optimizer": {"moment_precision": "bf16"}},
    "lora": {"precision": "bf16", "recompute": ["layernorm"]},
}


def test_what_needs_gpus_is_refused_before_a_job_waits_for_a_node_without():
    """Slurm is asked for none by `cluster.gpus_per_node: 0`, the default. LoRA is made on request."""
    config = load(OF_GPUS, {})
    with pytest.raises(ConfigError) as error:
        check_trainings(config)
    assert str(error.value).splitlines() == [
        f"{key} needs a GPU, and cluster.gpus_per_node is 0, so trainings run on CPUs; say how many GPUs a "
        "node has, or take another value"
        for key in (
            "model.precision: fp8_current",
            "pretrain.cuda_graphs: True",
            "sft.optimizer.moment_precision: bf16",
        )
    ]
    with pytest.raises(ConfigError, match=r"^lora\.recompute: layernorm needs a GPU"):
        check_requested(config, config.training("lora"), Limits())
    config = load(OF_GPUS | {"cluster": {"gpus_per_node": 1}}, {})
    check_trainings(config)
    check_requested(config, config.training("lora"), Limits())
