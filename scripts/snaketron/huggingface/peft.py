"""Adapters in PEFT's format: the names of their tensors, adapter_config.json, and what PEFT cannot express.

PEFT 0.21 adapts modules of transformers' NemotronH by their names. That model has queries, keys and values
apart, and the routed experts of a layer in one parameter, which PEFT wraps as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from snaketron.config import Adapters, Model
from snaketron.config.linears import linears, targeted
from snaketron.huggingface.names import Part, Tensor, tensors

_MTP = "mtp."
_EXPERT = re.compile(r"(.*\.mixer\.experts)\.\d+\.(up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of the adapter of a module; its rows are those of the checkpoint, one expert below the other.

    module: as PEFT's target names it, such as mixer.q_proj.
    experts: of B of routed experts: PEFT has its columns (rank, experts), each with the rows of one expert.
    """

    tensor: Tensor
    module: str
    experts: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        rows, columns = self.tensor.shape
        return (rows // self.experts, columns * self.experts) if self.experts else (rows, columns)

    @property
    def is_computed(self) -> bool:
        """Whether transformers computes the module at all: it does not know multi-token prediction."""
        return not self.tensor.name.startswith(_MTP)


def refused(adapters: Adapters, model: Model) -> list[str]:
    """Why PEFT cannot express these adapters, a line each; none where it can."""
    found = targeted(adapters.target_modules, linears(model, model.hybrid_layer_pattern, with_mtp=True))
    names = {linear.name for linear in found}
    problems = []
    if "decoder.layers.mixer.out_proj" in names:
        problems.append(
            "out_proj of Mamba-2: PEFT refuses to adapt it, because the kernels of a GPU read its weight "
            "without the module"
        )
    if names and all(name.startswith(_MTP) for name in names):
        problems.append("every target is in multi-token prediction, which transformers does not compute")
    if not problems:
        return []
    others = [name for name in adapters.target_modules if not name.endswith("out_proj")]
    such = f", such as [{', '.join(others)}]" if 0 < len(others) < len(adapters.target_modules) else ""
    return [
        *(f"lora.target_modules: {problem}" for problem in problems),
        f"take hf/lora_merged, a whole model with the adapters in its weights, or train other targets{such}",
    ]


def factors(model: Model, adapters: Adapters) -> list[Factor]:
    """Both factors of every adapter in the order of the published tensors, multi-token prediction last."""
    wanted = targeted(adapters.target_modules, linears(model, model.hybrid_layer_pattern, with_mtp=True))
    names = {linear.name for linear in wanted}
    found: list[Factor] = []
    experts: dict[tuple[str, str], list[Tensor]] = {}  # by layer and projection
    for tensor in tensors(model, vocab_size=1):
        if _linear(tensor) not in names:
            continue
        if expert := _EXPERT.fullmatch(tensor.name.removesuffix(".weight")):
            experts.setdefault((expert[1], expert[2]), []).append(tensor)
        else:
            found += _pair(tensor, adapters.rank)
    rank = adapters.expert_rank or adapters.rank
    for (layer, projection), group in experts.items():
        # PEFT wraps the wrapper of the first parameter when a second one of the module is adapted.
        inner = projection == "up_proj" and (layer, "down_proj") in experts
        found += _pair_of_experts(group, layer + ".base_layer" * inner, projection, rank)
    return sorted(found, key=lambda factor: not factor.is_computed)


def _linear(tensor: Tensor) -> str:
    """The linear layer of a tensor, as `config.linears` names it."""
    module = tensor.parts[0].key.partition(".weight")[0]
    return re.sub(r"\.\d+(?=\.)", "", module).replace(".experts.experts.", ".experts.")


def _peft(name: str) -> str:
    """The name of a module in the tree that PEFT wraps; transformers calls the backbone `model`."""
    return name if name.startswith(_MTP) else f"base_model.model.model.{name.removeprefix('backbone.')}"


def _factor_key(part: Part, letter: str) -> str:
    """The key of a factor in the checkpoint; in_proj's B is divided as its weight is."""
    module, _, divided = part.key.partition(".weight")
    return f"{module}.lora.{letter}{divided if letter == 'b' else ''}"


def _pair(tensor: Tensor, rank: int) -> list[Factor]:
    name = tensor.name.removesuffix(".weight")
    module = f"mixer.{name.partition('.mixer.')[2]}"
    a = Part(_factor_key(tensor.parts[0], "a"), 0, rank)
    b = tuple(Part(_factor_key(part, "b"), part.start, part.stop) for part in tensor.parts)
    outputs, inputs = tensor.shape
    return [
        Factor(Tensor(f"{_peft(name)}.lora_A.weight", (rank, inputs), (a,)), module),
        Factor(Tensor(f"{_peft(name)}.lora_B.weight", (outputs, rank), b), module),
    ]


def _pair_of_experts(group: list[Tensor], layer: str, projection: str, rank: int) -> list[Factor]:
    (outputs, inputs), count, part = group[0].shape, len(group), group[0].parts[0]
    a = tuple(Part(_factor_key(part, "a"), 0, rank, e) for e in range(count))
    b = tuple(Part(_factor_key(part, "b"), 0, outputs, e) for e in range(count))
    module = f"mixer.experts.{projection}"
    return [
        Factor(Tensor(f"{_peft(layer)}.lora_A.weight", (count * rank, inputs), a), module),
        Factor(Tensor(f"{_peft(layer)}.lora_B.weight", (count * outputs, rank), b), module, count),
    ]


def adapter_config(adapters: Adapters, found: Iterable[Factor], base: str) -> dict[str, Any]:
    """adapter_config.json. `base` is what transformers loads below the adapters: a directory or a hub id.

    The dropout of the training is left out: PEFT has none for parameters, and none is used in inference.
    """
    targets = list(dict.fromkeys(factor.module for factor in found if factor.is_computed))
    # What is no module of its own: the routed experts of a layer, and the weight of the router.
    experts = [module for module in targets if module.startswith("mixer.experts.")]
    parameters = [*experts, *(f"{module}.weight" for module in targets if module == "mixer.gate")]
    rank = adapters.expert_rank if adapters.expert_rank != adapters.rank else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "bias": "none",
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "target_modules": [m for m in targets if m not in experts and m != "mixer.gate"],
        "target_parameters": parameters or None,
        "rank_pattern": dict.fromkeys(experts, rank) if rank else {},
        # PEFT divides by each rank, and here one scale, alpha / rank, holds for all adapters.
        "alpha_pattern": dict.fromkeys(experts, adapters.alpha * rank / adapters.rank) if rank else {},
    }
