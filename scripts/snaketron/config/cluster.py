"""How many processes share a model, and the nodes that they run on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from snaketron.config.base import Count, Positive, Section, Text, key

from pydantic import ConfigDict, Field, field_validator

Split = Literal["time", "layers"]
GpuName = Literal["h100", "h200", "b200", "gb200", "gb300"]


class Parallel(Section):
    """How many processes share a model. Changing it continues the same training."""

    model_config = ConfigDict(frozen=True)  # `sizes.stages` keeps what it finds for one

    tensor_model_parallel_size: Positive = key(
        1, "processes that share each layer (with sequence parallelism)"
    )
    pipeline_model_parallel_size: Positive = key(1, "processes that hold consecutive layers")
    pipeline_split: Split = key(
        "time",
        "what the stages of a pipeline have equally much of: time, by the estimate, or layers, which leaves "
        "more memory to the first stages",
    )
    context_parallel_size: Positive = key(1, "processes that share each sequence")
    expert_model_parallel_size: Positive = key(1, "processes that share the routed experts")
    expert_tensor_parallel_size: Positive = key(1, "processes that share each routed expert")
    data_parallel_size: Positive = key(1, "copies of the model, each with its part of the global batch")

    @property
    def sequence_multiple(self) -> int:
        """Lengths of sequences are a multiple of it: context parallelism gives each process two chunks."""
        return 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1

    @property
    def world_size(self) -> int:
        """Number of processes (GPUs) of the job."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )


class Cluster(Section):
    """The nodes that trainings run on. The site's names (partition, account, limits) are the profile's."""

    gpus_per_node: Count = key(0, "GPUs of a node, one process each; 0: trainings run on CPUs")
    tasks_per_node: Positive | None = key(
        None,
        "processes of a training on a node without GPUs; null: all on one node. On GPUs each has one process",
    )
    gpu: GpuName | None = key(
        None,
        "the GPU: the times of steps are estimated for it, unless tokens_per_second_per_gpu is stated; null: "
        "not known",
    )
    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = key(
        None,
        "memory of a GPU (10^9 bytes); a training that needs more, by the estimate of the dry-run, is an "
        "error; leave some for libraries (2 GB) and the allocator; null: not checked",
    )
    container: Text | None = key(
        None, "image that the processes of a training run in (envs/); null: the environment of the workflow"
    )
    container_runtime: Literal["apptainer", "pyxis", "charliecloud"] = key(
        "apptainer",
        "what starts the image: `apptainer exec`, srun's --container-image (pyxis and enroot), or `ch-run`",
    )
    mounts: list[str] = key(
        list,
        "paths of the host that the image sees beside the working directory: `path` or `path:path_inside`",
    )
    cache_dir: Text | None = key(
        None,
        "directory on a disk of each node for compiled kernels, kept from job to job; null: below $TMPDIR",
    )
    environment: dict[str, str] = key(
        dict, "variables of the environment of a training's processes, over our defaults (docs/slurm.md)"
    )
    secrets_file: Text | None = key(
        None, "file of mode 600 with lines NAME=value, such as WANDB_API_KEY, for the trainings alone"
    )

    @field_validator("gpu", mode="before")
    @classmethod
    def _is_known(cls, gpu: Any) -> Any:
        if gpu is not None and gpu not in get_args(GpuName):
            raise ValueError(
                f"cluster.gpu: {gpu!r} is none of {', '.join(get_args(GpuName))}; null goes for all others, "
                "and their time is estimated where tokens_per_second_per_gpu of a training is stated"
            )
        return gpu
