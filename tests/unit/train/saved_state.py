"""One of one or two processes that load, or make, the state of an optimizer, and save it.

    python -m tests.unit.train.saved_state '{"name": "/tmp/one", "load": "/tmp/two", "parallel": {...}}'

In bf16, in which main weights are not the model's. The checkpoint is `<name>/`; what a rank holds of every
parameter's main weight and moments is in `<name>_<rank>.pt`.
"""

import json
import sys
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.distributed import distributed
from snaketron.train import loop
from snaketron.train.build import build_training
from tests.gpu.worker import fixed

import torch


def held(trainer: loop.Trainer) -> dict[str, tuple[int, int, dict[str, torch.Tensor]]]:
    """By parameter: which of its numbers this rank has, and their main weights and moments."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    found = {}
    for part in trainer.optimizer.chained_optimizers:
        for ranges in part.gbuf_ranges:
            for buckets in ranges.values():
                for bucket in buckets:
                    for parameter, span in bucket["param_map"].items():
                        state = part._get_main_param_and_optimizer_states(parameter)
                        values = {key: value.detach().clone().view(-1) for key, value in state.items()}
                        found[names[parameter]] = span["param"].start, span["param"].end, values
    return found


def main(name: str, parallel: dict[str, int], load: str | None = None) -> None:
    torch.set_num_threads(1)
    # A bucket for each parameter, with padding at its end, where a large model between nodes has some.
    backend.data_parallel_options = lambda run: {"overlap_grad_reduce": True, "bucket_size": 1}
    settings, run, make_batches = fixed({"precision": "bf16"}, {"parallel": parallel}, {})
    with distributed(settings.seed, run):
        trainer = loop.Trainer(build_training(settings, run, 512))
        buckets = [bucket for buffer in trainer.parallel_model.buffers for bucket in buffer.buckets]
        assert any(bucket.numel_unpadded < bucket.grad_data.numel() for bucket in buckets)
        if load:
            assert trainer.resume(Path(load))
        else:
            batches = make_batches()
            for _ in range(2):
                trainer._step(batches)
        torch.save(held(trainer), f"{name}_{torch.distributed.get_rank()}.pt")
        trainer.save(Path(name))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
