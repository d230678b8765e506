"""Loss mathematics as pure functions of tensors; `ullme/objectives/` composes them.

Scores are higher = closer. Every function returns a mean (or the per-row values that a caller averages over the whole
batch), never a sum that grows with the batch or the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ullme.pooling import at_least_float32

__all__ = ["entropy", "info_nce", "kl_alignment", "kto", "preference", "token_logprobs"]

LOGIT_BYTES = 64 * 2**20


def info_nce(
    similarity: Float[Tensor, "Q C"],
    target: Int[Tensor, " Q"],
    ignored: Bool[Tensor, "Q C"],
    *,
    temperature: float | Float[Tensor, ""],
) -> Float[Tensor, " Q"]:
    """-log softmax(s / tau)[target] per query; `ignored` candidates (known positives, false negatives) leave the sum.

    InfoNCE (arXiv 1807.03748, eq. 4) with in-batch and hard negatives as columns. A temperature that is learned has a gradient.
    """
    logits = (similarity / temperature).masked_fill(ignored, float("-inf"))
    return functional.cross_entropy(logits, target, reduction="none")


def preference(difference: Float[Tensor, "Q N"], loss: str, *, beta: float, label_smoothing: float = 0.0) -> Float[Tensor, "Q N"]:
    """Loss of preferring p+ to p-; difference d = (log pi(p+) - log pi_ref(p+)) - (log pi(p-) - log pi_ref(p-)).

    sigmoid: -log sigma(beta d), DPO (arXiv 2305.18290, eq. 7) on summed log-probabilities; with label smoothing eps the
    conservative form (1 - eps) L(d) + eps L(-d). ipo: (d - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17) on mean ones.
    hinge: max(0, 1 - beta d), the normalised hinge of RSO (arXiv 2309.06657), on summed ones.
    """
    if loss == "ipo":
        return (difference - 1 / (2 * beta)).square()
    margin = beta * difference
    if loss == "hinge":
        return (1 - margin).clamp_min(0)
    return -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)


def kto(
    gain: Float[Tensor, "Q K"], present: Bool[Tensor, "Q K"], baseline: Float[Tensor, ""], *, beta: float
) -> Float[Tensor, " Q"]:
    """KTO (arXiv 2402.01306, section 4.1) per query, its positive (column 0) desirable and its negatives undesirable.

    gain: r = log pi(p) - log pi_ref(p), summed over tokens; baseline: z, what r is on average without any preference (see
    `CandidateLogprobs.baseline`). A positive loses 1 - sigma(beta (r - z)), a negative 1 - sigma(beta (z - r)). Half the positive's
    plus half the mean over the present negatives, so that both sides weigh the same however many negatives a query has.
    """
    away = beta * (gain - baseline)
    desirable, undesirable = torch.sigmoid(-away[:, 0]), torch.sigmoid(away[:, 1:])
    there = present[:, 1:]
    return (desirable + undesirable.where(there, 0.0).sum(1) / there.sum(1).clamp_min(1)) / 2


def kl_alignment(
    representation: Float[Tensor, "Q K"],
    generation: Float[Tensor, "Q K"],
    present: Bool[Tensor, "Q K"],
    *,
    temperature: float,
    generation_temperature: float,
) -> Float[Tensor, " Q"]:
    """KL(P_g || P_r) per query, over its own candidates: the alignment term of GRL (arXiv 2408.03402, section 2.3).

    P_r = softmax(s_r / tau), P_g = softmax(s_g / tau_g); gradients flow into P_r only. `present` is False where a query
    has fewer candidates than K.
    """
    target = _masked_log_softmax(generation.detach() / generation_temperature, present)
    student = _masked_log_softmax(representation / temperature, present)
    return torch.where(present, target.exp() * (target - student), 0.0).sum(1)


def entropy(scores: Float[Tensor, "Q K"], present: Bool[Tensor, "Q K"], *, temperature: float) -> Float[Tensor, " Q"]:
    """Entropy in nats of softmax(scores / temperature) over the present candidates."""
    logs = _masked_log_softmax(scores / temperature, present)
    return -torch.where(present, logs.exp() * logs, 0.0).sum(1)


def _masked_log_softmax(logits: Tensor, present: Tensor) -> Tensor:
    lowest = torch.finfo(logits.dtype).min
    return functional.log_softmax(logits.masked_fill(~present, lowest), dim=1).masked_fill(~present, 0.0)


class _FrozenHead(torch.autograd.Function):
    """log softmax(H W^T)[target] per token and its gradient (W[target] - softmax W), a block of rows after the other.

    Each logit is computed once, not again in the backward pass: the gradient of a token's log-probability is known before anybody
    asks for it, up to the factor that comes back.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learns: bool) -> Tensor:
        found = at_least_float32(hidden.new_empty(len(hidden)))
        gradient = torch.empty_like(hidden) if learns else None
        rows = max(1, LOGIT_BYTES // (4 * len(weight)))
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            logits, wanted = at_least_float32(hidden[block] @ weight.T), targets[block].unsqueeze(1)
            chosen = logits.gather(1, wanted)
            most = logits.amax(1, keepdim=True)
            total = logits.sub_(most).exp_().sum(1, keepdim=True)
            found[block] = (chosen - most - total.log()).squeeze(1)
            if gradient is not None:
                logits.div_(-total).scatter_add_(1, wanted, torch.ones_like(chosen))
                gradient[block] = logits.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0].unsqueeze(1)).to(gradient.dtype), None, None, None


def token_logprobs(hidden: Float[Tensor, "T D"], head: nn.Module, targets: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
    """log softmax(head(hidden))[targets] per token, without ever holding all T x V logits.

    A linear head that learns nothing here, as under LoRA, gives the gradient on the way: two products, nothing computed twice. One
    that is trained goes through torch's fused linear cross-entropy, where this torch has it; anything else in checkpointed chunks.
    """
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    plain = weight is not None and bias is None and type(weight) in (Tensor, nn.Parameter) and isinstance(head, nn.Linear)
    learning = torch.is_grad_enabled()
    if weight is not None and plain and not (learning and weight.requires_grad):
        return _FrozenHead.apply(hidden, weight, targets, learning and hidden.requires_grad)  # type: ignore[no-any-return]
    fused: Callable[..., Tensor] | None = getattr(functional, "linear_cross_entropy", None)
    options: Any = getattr(nn, "LinearCrossEntropyOptions", None)
    if fused is not None and options is not None and plain and len(hidden) >= hidden.shape[1]:
        return -at_least_float32(fused(hidden, weight, targets, reduction="none", options=options()))
    vocabulary = weight.shape[0] if weight is not None else head(hidden[:1]).shape[-1]
    rows = max(1, LOGIT_BYTES // (4 * vocabulary))

    def score(states: Tensor, wanted: Tensor) -> Tensor:
        return -functional.cross_entropy(at_least_float32(head(states)), wanted, reduction="none")

    pieces = [
        checkpoint(score, hidden[start : start + rows], targets[start : start + rows], use_reentrant=False)
        for start in range(0, len(hidden), rows)
    ]
    return torch.cat([piece for piece in pieces if piece is not None]) if pieces else hidden.new_zeros(0, dtype=torch.float32)
