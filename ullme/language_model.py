"""The same weights as a language model: its head, proven, log-probabilities of the tokens that are scored, and text it writes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ullme.attention import _mode, hidden_states, trunk
from ullme.batches import Batch
from ullme.errors import ConfigError
from ullme.losses import token_logprobs

__all__ = ["LogitHead", "chosen", "proven_head", "summed_logprobs", "written"]

TOLERANCE = 0.05
"""Of the largest logit: more than half precision rounds, less than a forgotten scale or cap makes."""


class LogitHead(nn.Module):
    """An LM head whose logits go through what its family does with them: a soft-cap (Gemma 2), a scale (Granite, Cohere)."""

    def __init__(self, head: nn.Module, *, cap: float | None, scale: float) -> None:
        super().__init__()
        self.head, self.cap, self.scale = head, cap, scale

    @classmethod
    def of(cls, head: nn.Module, config: Any) -> nn.Module:
        """The head itself, where the configuration names nothing of the kind."""
        cap = getattr(config, "final_logit_softcapping", None)
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return head if not cap and scale == 1.0 else cls(head, cap=cap or None, scale=scale)

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Hidden state -> logits."""
        logits = self.head(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@torch.no_grad()
def proven_head(model: Any, called: str) -> nn.Module:
    """Hidden state -> logits, held against the model's own logits of a few tokens. called: what errors call the model.

    Raises:
        ConfigError: it has no head, or does something with its logits that is not known here.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is None:
        raise ConfigError(f"{called}: this model has no language-model head, so it cannot score or generate text")
    head = LogitHead.of(head, config)
    ids = torch.tensor([[3, 5, 7, 11]], device=next(model.parameters()).device) % config.vocab_size
    was_training = model.training
    model.eval()
    try:
        hidden = hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), is_causal=True)
        own, expected = head(hidden).float(), model(input_ids=ids, is_causal=True, use_cache=False).logits.float()
    finally:
        model.train(was_training)
    if not torch.allclose(own, expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max())):
        raise ConfigError(
            f"{called}: its logits are not what its head makes of its last states, so the generation terms would misread them; "
            "use objective: contrastive"
        )
    return head


def summed_logprobs(
    hidden: Float[Tensor, "B S D"], targets: Int[Tensor, "B S"], scored: Bool[Tensor, "B S"], head: nn.Module
) -> tuple[Float[Tensor, " B"], Int[Tensor, " B"]]:
    """Log-probabilities of the targets that are scored, each given the state beside it, summed per row; and their number."""
    logprobs = token_logprobs(hidden[scored], head, targets[scored])
    sums = torch.zeros(len(scored), dtype=logprobs.dtype, device=logprobs.device)
    return sums.index_add(0, scored.nonzero()[:, 0], logprobs), scored.sum(1)


def chosen(
    hidden: Float[Tensor, "B S D"], targets: Int[Tensor, "B S"], scored: Bool[Tensor, "B S"], head: nn.Module
) -> Bool[Tensor, " B"]:
    """Per row: whether every target that is scored is the likeliest token there, so that greedy decoding would write them all."""
    missed = head(hidden[scored]).argmax(-1) != targets[scored]
    misses = torch.zeros(len(scored), dtype=torch.long, device=scored.device)
    return misses.index_add(0, scored.nonzero()[:, 0], missed.long()) == 0


@torch.inference_mode()
def written(
    model: Any,
    tokenizer: Any,
    prompts: Batch,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """What the model writes after each prompt, causal, until it ends its text. prompts: padded on the left.

    temperature: 0 takes the likeliest token each time; above it tokens are drawn by `seed`, from the likeliest that together
    have probability `top_p`.
    """
    inner: Any = trunk(model)
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    drawing: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    devices = [prompts.input_ids.device] if prompts.input_ids.device.type == "cuda" else []
    width = prompts.input_ids.shape[1]
    mode = _mode(inner, is_causal=True, sliding_window="symmetric", tokens=width + max_new_tokens)
    with mode, torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=tokenizer.pad_token_id,
            **drawing,
        )
    return tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
