"""What was routed: active experts' bits, and how evenly rows are spread over experts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import codec
from ..ops import Indices


def expert_id_array(expert_ids: Indices) -> np.ndarray:
    ids = np.array(expert_ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expert_ids must be integers, got {ids.dtype}")
    return ids


def get_expert_bits(expert_ids: Indices, expert_bit_metadata: Mapping[int, tuple[float, ...]]) -> list[float]:
    """The up projection's bits of each distinct active expert, by ascending expert id.

    Args:
        expert_ids: Integers of any shape: the routed experts. Evaluated.
        expert_bit_metadata: ``{expert: (gate, up, down)}`` bits, without a gate ``(up, down)``.

    Raises:
        ValueError: If an active expert is not in the metadata.
    """
    active = np.unique(expert_id_array(expert_ids)).tolist()
    missing = [expert for expert in active if expert not in expert_bit_metadata]
    if missing:
        raise ValueError(f"expert_bit_metadata has no (gate, up, down) for the active experts {missing}")
    # Of (gate, up, down) and of (up, down).
    return [codec.as_width(expert_bit_metadata[expert][-2], "bits in expert_bit_metadata") for expert in active]


def analyze_expert_activation_pattern(expert_ids: Indices, num_experts: int) -> dict[str, float]:
    """How a call's rows spread over the experts.

    Args:
        expert_ids: Integers, shape ``[..., k]``. Evaluated.
        num_experts: Experts of the layer.

    Returns:
        ``activation_rate`` and ``expert_utilization`` (active experts over all), ``num_activated_experts``,
        ``tokens_per_expert_avg`` (slots over active experts), ``entropy`` (of the slots over the experts, in
        nats) and ``top_expert_share`` (share of the rows that have the most frequent expert among theirs).

    Raises:
        ValueError: If an id is not in ``[0, num_experts)``.
    """
    ids = expert_id_array(expert_ids)
    if ids.size and not 0 <= ids.min() <= ids.max() < num_experts:
        raise ValueError(f"expert_ids must lie in [0, {num_experts}), got {ids.min()} to {ids.max()}")
    rows = rows_per_expert(ids, num_experts)
    slots = np.bincount(ids.reshape(-1).astype(np.int64), minlength=num_experts) if ids.size else np.zeros(num_experts)
    active = int(np.count_nonzero(slots))
    shares = slots[slots > 0] / max(1, ids.size)
    return {
        "activation_rate": active / num_experts,
        "num_activated_experts": active,
        "tokens_per_expert_avg": ids.size / active if active else 0.0,
        "expert_utilization": active / num_experts,
        "entropy": float(-(shares * np.log(shares)).sum()) + 0.0,
        "top_expert_share": float(rows.max()) / count_rows(ids) if active else 0.0,
    }


def count_rows(ids: np.ndarray) -> int:
    return ids.size // ids.shape[-1] if ids.size else 0


def rows_per_expert(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """How many rows have each expert among theirs."""
    if not ids.size:
        return np.zeros(num_experts, np.int64)
    ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim else ids.reshape(1, 1)
    pairs = np.unique(np.arange(len(ids))[:, None] * num_experts + ids.astype(np.int64))
    return np.bincount(pairs % num_experts, minlength=num_experts)
