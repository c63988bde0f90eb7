"""The problems that a checkpoint poses to the kernels, from its headers and config alone."""

from __future__ import annotations

from pathlib import Path

from .. import ops
from ..kernels import Problem
from .experts import TOP_K_KEYS, activation_of, experts_per_token, unquantized_experts
from .model import module_at, open_checkpoint, product_accuracy


def model_problems(
    model_path: str | Path, dtype: str, device: str, accuracy: str | None = None
) -> dict[Problem, list[str]]:
    """The distinct problems of a checkpoint at one row, each with the modules that pose it.

    Args:
        model_path: An EXL3 directory. No weight is read.
        dtype: Of the activations.
        device: ``"cpu"`` or ``"gpu"``.
        accuracy: As for :func:`load`. Default: ``None``, the device's usual one.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the directory is not an EXL3 model.
    """
    accuracy = product_accuracy(accuracy, device)
    model, config, mapping = open_checkpoint(Path(model_path))
    problems: dict[Problem, list[str]] = {}
    for path, sources in mapping.experts.items():
        activation = activation_of(mapping.host, module_at(model, path))
        if activation is None:
            continue  # products of which the tuner times none: they are not fused
        is_dense = unquantized_experts(sources)
        stacks = [[s.quantized for s, dense in zip(listed, is_dense) if not dense] for listed in sources.values()]
        if not stacks[0]:
            continue
        experts = len(stacks[0])
        top_k = experts_per_token(config, experts, path)
        if top_k is None:
            keys = ", ".join(TOP_K_KEYS)
            raise ValueError(f"config.json does not say how many experts a token takes; looked for {keys}")
        make = Problem.swiglu if len(stacks) == 3 else Problem.mlp
        problem = make(
            module_at(model, path)[next(iter(sources))].weight.shape[2],
            stacks[0][0].padded_shape[1],
            experts=experts,
            top_k=top_k,
            bits=zip(*([w.bits for w in stack] for stack in stacks)),
            codebooks=[w.codebook for stack in stacks for w in stack],
            activation=activation.name,
            dtype=dtype,
            device=device,
            bias=any("bias" in w.parts for stack in stacks for w in stack),
            accuracy=accuracy,
            accelerators=ops.has_accelerators(device),
        )
        problems.setdefault(problem, []).append(path)
    for path, source in mapping.linears.items():
        out_features, in_features = module_at(model, path).weight.shape
        problem = Problem.linear(
            in_features,
            out_features,
            bits=source.quantized.bits,
            codebooks=source.quantized.codebook,
            dtype=dtype,
            device=device,
            bias="bias" in source.linear.parts,
            accuracy=accuracy,
            accelerators=ops.has_accelerators(device),
        )
        problems.setdefault(problem, []).append(path)
    return problems
