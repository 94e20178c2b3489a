"""How tokens reach their experts, against model and layout: what megatron-core 0.19.2 would refuse."""

from __future__ import annotations

from collections.abc import Iterator

from snaketron.config.trainings import Training


def check_dispatcher(training: Training) -> Iterator[str]:
    """What is wrong with the dispatcher of a training, and with the overlap of the expert of all tokens."""
    model, run = training.model, training.run
    at = f"{training.at('moe_token_dispatcher')} {run.moe_token_dispatcher}"
    if run.moe_token_dispatcher != "alltoall" and model.precision == "fp32":
        yield f"{at} sends tokens in bf16, and model.precision is fp32; set it to bf16 or below"
    parallel = run.parallel
    processes = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    if run.moe_token_dispatcher == "deepep" and processes == 1:
        yield (
            f"{at} needs experts on several processes: raise {training.at('parallel')}"
            ".expert_model_parallel_size (now 1), or take alltoall"
        )
    if not run.moe_shared_expert_overlap:
        return
    overlap = training.at("moe_shared_expert_overlap")
    if model.moe_latent_size is not None:
        yield (
            f"{overlap}: megatron-core has no overlap for experts in a latent space in a training "
            f"(model.moe_latent_size {model.moe_latent_size}); leave it out"
        )
    if "shared_experts" in run.recompute:
        yield f"{overlap} and shared_experts in {training.at('recompute')}: leave one of them out"
