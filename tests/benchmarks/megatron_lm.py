"""Megatron-LM's own pretrain_hybrid.py beside Snaketron: one GPU, one run, one shape after the other.

    python -m tests.benchmarks.megatron_lm --megatron-lm DIR                    # all of SHAPES
    python -m tests.benchmarks.megatron_lm --megatron-lm DIR super_8k nano_8k   # shapes of gpu_training
    python -m tests.benchmarks.megatron_lm --megatron-lm DIR --check            # needs no GPU

DIR is a checkout of github.com/NVIDIA/Megatron-LM; the folder `megatron` and the programs beside it are
enough. Its options follow from Snaketron's settings. `--check` parses them there, and compares the
TransformerConfig of both in every field that both have; a run compares the numbers of parameters. Each shape
is trained there plainly and with its CUDA graphs, on its mock data. Tokens/s are those of the median of the
last six of 12 steps, as in gpu_training; the ratio is that to the faster of the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from snaketron.config import Model
from snaketron.sizes.flops import training_flops

from tests.benchmarks.gpu_training import VARIANTS, configured, steady, turn_of
from tests.benchmarks.shapes import VOCABULARY
from tests.benchmarks.turns import Turn, take, wait_for_turn

SHAPES = ["super_8k_mtp2", "nano_8k", "nano_4k", "nano_8k_fp8_current"]
STEPS = 12
# Keys of the model whose option has another name, or that are no single option; the others are called alike.
RENAMED = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}
APART = {
    "hybrid_layer_pattern",
    "mtp_hybrid_layer_pattern",
    "mtp_num_layers",
    "precision",
    "bf16_layers_at_end",
}
PRECISION = {
    "bf16": "",
    "fp8_current": "--fp8-format hybrid --fp8-recipe tensorwise",
    "fp8_blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "fp8_delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 "
    "--fp8-amax-compute-algo max",
}
# What `spec.transformer_config` says of every model.
ARCHITECTURE = shlex.split("""
    --spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --is-hybrid-model
    --use-mcore-models --bf16 --normalization RMSNorm --squared-relu --disable-bias-linear
    --group-query-attention --untie-embeddings-and-output-weights --position-embedding-type none
    --hidden-dropout 0 --attention-dropout 0 --calculate-per-token-loss --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-load-balancing-type seq_aux_loss --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall
""")
# Its fastest kernels, and nothing that makes the host wait for the GPU without need. It refuses Transformer
# Engine's cross entropy. Sums of gradients inside its own linear layers want Apex.
FASTEST = shlex.split("""
    --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion --use-fused-weighted-squared-relu
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native --no-gradient-accumulation-fusion
    --use-distributed-optimizer --no-check-for-nan-in-loss-and-grad --rerun-mode disabled --manual-gc
    --no-create-attention-mask-in-dataloader
""")
BF16_STATE = shlex.split("""
    --grad-reduce-in-bf16 --use-precision-aware-optimizer --main-grads-dtype bf16 --exp-avg-dtype bf16
    --exp-avg-sq-dtype bf16
""")
GRAPHS = shlex.split("--cuda-graph-impl local --te-rng-tracker --cuda-graph-modules attn mamba")
ROUTER = ["moe_router", "moe_preprocess"]  # not in fp8, where tokens are padded by what the host reads
# A tokenizer without a vocabulary of its own has one token more than it is told.
RUN = shlex.split(f"""
    --mock-data --tokenizer-type NullTokenizer --vocab-size {VOCABULARY - 1} --num-workers 2
    --train-iters {STEPS} --lr-decay-style constant --eval-iters 0 --eval-interval 1000 --log-interval 1
    --log-throughput
""")
ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NVTE_USE_CUTLASS_GROUPED_GEMM": "1",  # its experts are a fifth faster with it
    "TRITON_CACHE_AUTOTUNING": "1",  # kernels that Snaketron has tuned are tuned
}
# Fields of TransformerConfig that may differ without CUDA graphs.
MAY_DIFFER = {
    "cross_entropy_fusion_impl": "Megatron-LM refuses Transformer Engine's",
    "gradient_accumulation_fusion": "Megatron-LM wants Apex for it",
    "moe_router_padding_for_quantization": "Snaketron's experts need no padding in fp8",
    "persist_layer_norm": "of a kernel that is not used",
    "bias_dropout_fusion": "of a kernel that is not used",
    "masked_softmax_fusion": "of a kernel that is not used",
    "attention_softmax_in_fp32": "of a kernel that is not used",
    "cp_comm_type": "of several processes",
    "deallocate_pipeline_outputs": "of several processes",
    "tensor_parallel_num_weight_shards": "of several processes",
    "expert_tensor_parallel_num_weight_shards": "of several processes",
    "cuda_graph_modules": "which layers are recorded, of none",
    "inference_cuda_graph_scope": "no part of a step",
    "inference_sampling_seed": "no part of a step",
    "use_cpu_initialization": "no part of a step",
}


def options(variant: dict[str, Any], *, graphs: bool) -> list[str]:
    """The command line of pretrain_hybrid.py that trains a variant of gpu_training."""
    config = configured(variant)
    model, run, optimizer = config.model, config.pretrain, config.pretrain.optimizer
    sizes = {
        RENAMED.get(key, key): getattr(model, key)
        for key in Model.model_fields
        if key not in APART and getattr(model, key) is not None
    }
    sizes |= {"seq_length": run.seq_length, "max_position_embeddings": run.seq_length}
    sizes |= {"micro_batch_size": run.micro_batch_size, "global_batch_size": run.global_batch_size}
    sizes |= {"lr": optimizer.learning_rate, "min_lr": optimizer.min_learning_rate}
    sizes |= {key: getattr(optimizer, key) for key in ("weight_decay", "clip_grad", "adam_beta1")}
    sizes |= {key: getattr(optimizer, key) for key in ("adam_beta2", "adam_eps")}
    depths = [model.mtp_hybrid_layer_pattern] * model.mtp_num_layers
    given = ["--hybrid-layer-pattern", "/".join([model.hybrid_layer_pattern, *depths])]
    if depths:
        given += ["--mtp-num-layers", str(model.mtp_num_layers), "--mtp-use-repeated-layer"]
    for key, value in sizes.items():
        given += [f"--{key.replace('_', '-')}", str(value)]
    given += [*ARCHITECTURE, *FASTEST, *shlex.split(PRECISION[model.precision]), *RUN]
    if model.precision != "bf16":
        given.append("--moe-router-padding-for-quantization")
    if (optimizer.gradient_precision, optimizer.moment_precision) == ("bf16", "bf16"):
        given += BF16_STATE
    return given + ([*GRAPHS, *(ROUTER if model.precision == "bf16" else [])] if graphs else [])


# ------------------------------------------------------------------------------- in a process of Megatron-LM


def train(directory: Path, given: list[str]) -> None:
    """Megatron-LM's program with these options, once the measurements before are over."""
    sys.path.insert(0, str(directory))
    import megatron.training  # noqa: F401
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.datasets import utils

    if list((directory / "megatron/core/datasets").glob("helpers_cpp*.so")):
        utils.compile_helpers = lambda: None  # they are compiled, and a compiler may not be there
    sys.argv = ["pretrain_hybrid.py", *given]
    wait_for_turn()
    runpy.run_path(str(directory / "pretrain_hybrid.py"), run_name="__main__")


def read(text: str) -> dict[str, Any]:
    """What Megatron-LM's log says; ValueError where a step is missing."""
    steps = re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", text)
    if len(steps) < STEPS:
        raise ValueError(f"{len(steps)} of {STEPS} steps")
    parameters = re.search(r"number of parameters on .*?: (\d+)", text)
    losses = re.findall(r"lm loss: ([-+.\dE]+)", text)
    return {
        "seconds": [float(step) / 1e3 for step in steps],
        "parameters": int(parameters[1]) if parameters else None,
        "losses": [float(loss) for loss in losses],
        "peak_gib": max([float(mb) / 1024 for mb in re.findall(r"max allocated: ([\d.]+)", text)], default=0),
    }


def fields_there(directory: Path, lines: list[list[str]]) -> list[dict[str, str]]:
    """The TransformerConfig that Megatron-LM makes of each command line, on any machine."""
    sys.path.insert(0, str(directory))
    import torch
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    TransformerConfig.__post_init__ = lambda self: None  # it wants Transformer Engine
    if not torch.cuda.is_available():  # it asks which GPU this is
        torch.cuda.get_device_capability = lambda *_: (9, 0)
        torch.cuda.get_device_properties = lambda *_: argparse.Namespace(major=9, minor=0)
    found = []
    for given in lines:
        sys.argv = ["pretrain_hybrid.py", *given]
        args = parse_args()
        validate_args(args, {})
        found.append(_fields(core_transformer_config_from_args(args)))
    return found


def fields_here(names: list[str]) -> list[dict[str, str]]:
    """The TransformerConfig of variants of gpu_training, as on a GPU."""
    from snaketron.model import spec
    from snaketron.model.megatron.gpu import TRANSFORMER_CONFIG

    from megatron.core.transformer import TransformerConfig

    TransformerConfig.__post_init__ = lambda self: None  # it wants Transformer Engine
    configs = [configured(VARIANTS[name]) for name in names]
    return [
        _fields(spec.transformer_config(c.model, c.pretrain.parallel, **TRANSFORMER_CONFIG)) for c in configs
    ]


def _fields(config: Any) -> dict[str, str]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: re.sub(r" at 0x\w+", "", str(value)) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------- together


def check(directory: Path, names: list[str]) -> int:
    """Compare both TransformerConfigs of each shape; the exit status."""
    lines = [options(VARIANTS[name], graphs=graphs) for name in names for graphs in (False, True)]
    command = [sys.executable, "-m", "tests.benchmarks.megatron_lm", "--megatron-lm", str(directory)]
    command += ["--fields", json.dumps(lines)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
        return 1
    there = json.loads(done.stdout.splitlines()[-1])[::2]
    failed = False
    for name, theirs, ours in zip(names, there, fields_here(names), strict=True):
        both = theirs.keys() & ours.keys()
        differ = sorted(key for key in both if theirs[key] != ours[key])
        print(f"{name}: {len(both)} fields of TransformerConfig compared, {len(differ)} differ")
        for key in differ:
            why = MAY_DIFFER.get(key, "MUST NOT DIFFER")
            failed |= key not in MAY_DIFFER
            print(f"    {key}: {theirs[key]} there, {ours[key]} here ({why})")
    return int(failed)


def turns(directory: Path, names: list[str]) -> list[Turn]:
    """Each shape here, and there without and with CUDA graphs."""
    found = []
    for name in names:
        found.append(turn_of(name, []))
        for graphs in (False, True):
            command = ["-m", "tests.benchmarks.megatron_lm", "--megatron-lm", str(directory), "--train"]
            command.append(json.dumps(options(VARIANTS[name], graphs=graphs)))
            label = f"{name}_megatron" + ("_graphs" if graphs else "")
            found.append(Turn(label, command, read, environment=ENVIRONMENT))
    return found


def table(results: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Tokens/s of each shape, and the ratio to Megatron-LM's best."""
    lines = [
        "| shape | Snaketron tokens/s | TFLOP/s | Megatron-LM | with graphs | ratio | parameters | loss |"
    ]
    lines.append("|---|" + "--:|" * 7)
    for name in names:
        run = configured(VARIANTS[name]).pretrain
        tokens = run.global_batch_size * run.seq_length
        ways = [results.get(label) for label in (name, f"{name}_megatron", f"{name}_megatron_graphs")]
        rates = [tokens / steady(way["seconds"]) if way else 0.0 for way in ways]
        ratio = rates[0] / max(rates[1:]) if all(rates[:1]) and max(rates[1:]) else 0.0
        flops = training_flops(configured(VARIANTS[name]).model, VOCABULARY, run.seq_length)
        counts = {way["parameters"] for way in ways if way}
        equal = ", ".join(f"{count:,}" for count in sorted(counts)) + " DIFFER" * (len(counts) > 1)
        losses = " ".join(f"{way['losses'][-1]:.3f}" if way else "-" for way in ways)
        told = [f"{rate:,.0f}" if rate else "failed" for rate in rates]
        teraflops = f"{rates[0] * flops / 1e12:.0f}"
        cells = [name, told[0], teraflops, told[1], told[2], f"{ratio:.2f}", equal, losses]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--megatron-lm", type=Path, required=True, metavar="DIR")
    parser.add_argument("--check", action="store_true", help="compare what both would build")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after this")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--fields", help=argparse.SUPPRESS)
    args = parser.parse_args()
    directory = args.megatron_lm.resolve()
    if not (directory / "pretrain_hybrid.py").is_file():
        parser.error(f"{directory}: no checkout of Megatron-LM, which has pretrain_hybrid.py")
    if args.train:
        train(directory, json.loads(args.train))
        return 0
    if args.fields:
        print(json.dumps(fields_there(directory, json.loads(args.fields))))
        return 0
    if args.check:
        return check(directory, args.shapes)
    out = Path(os.environ.get("OUT", "."))
    results = {}
    for turn, result in take(turns(directory, args.shapes), out, args.seconds):
        results[turn.name] = result
        print(json.dumps({"name": turn.name} | result), flush=True)
    (out / "megatron_lm.json").write_text(json.dumps(results, indent=1))
    print(table(results, args.shapes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
