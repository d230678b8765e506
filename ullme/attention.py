"""Causal <-> bidirectional attention of one set of weights, per call, and the proof that it really happened.

transformers >= 5.2 takes `is_causal=False` in a forward call of a decoder, so no modelling file is copied. `hidden_states` asks
for a mode in a way that every family obeys. A layer that quietly stays causal would only cost quality, so `check_bidirectional`
proves the switch layer by layer, at load: it measures which positions of its own input each layer's output depends on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from ullme.bottleneck import PREFIX, SPECIAL, SUFFIX, bottleneck_mask, model_masks
from ullme.errors import ConfigError
from ullme.reach import reach

__all__ = [
    "AttentionReport",
    "LayerAttention",
    "SlidingWindow",
    "attention_dropout",
    "check_attention_dropout",
    "check_bidirectional",
    "check_bottleneck",
    "decoder_layers",
    "hidden_states",
    "is_encoder",
    "layer_reach",
    "trunk",
]

SlidingWindow = Literal["symmetric", "full"]
"""What a sliding-window layer sees when bidirectional: |i - j| < window, or everything."""

PROBE_TOKENS = 6


@dataclass(frozen=True)
class Quirk:
    """What a family of models needs beyond `is_causal` in the call and in the configuration."""

    explicit_mask: bool = False
    """A bidirectional call must bring a mask also where nothing is padded."""
    positions_after_padding: bool = False
    """Positions are always given, and start after the padding row of the position table."""


QUIRKS = {
    # Their layers drop the call's is_causal; without a mask sdpa then asks the attention module, which says causal.
    "nemotron": Quirk(explicit_mask=True),
    "stablelm": Quirk(explicit_mask=True),
    # Its trunk converts the mask without looking whether there is one.
    "mpt": Quirk(explicit_mask=True),
    # As in fairseq, positions start at padding_idx + 1, and by themselves skip tokens that look like padding.
    "camembert": Quirk(positions_after_padding=True),
    "data2vec-text": Quirk(positions_after_padding=True),
    "mpnet": Quirk(positions_after_padding=True),
    "roberta": Quirk(positions_after_padding=True),
    "roberta-prelayernorm": Quirk(positions_after_padding=True),
    "xlm-roberta": Quirk(positions_after_padding=True),
    "xlm-roberta-xl": Quirk(positions_after_padding=True),
}


def trunk(model: nn.Module) -> nn.Module:
    """The transformer below the LM head (all of an encoder model), adapters included."""
    outer: Any = model
    inner = outer.get_base_model() if hasattr(model, "get_base_model") else outer  # a PEFT wrapper
    below = inner.base_model if inner.base_model is not inner else inner.get_decoder()
    return below if below.get_output_embeddings() is None else below.model  # llama4's causal LM is its own base model


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The stacked layers, lowest first: the outermost ModuleList as long as the configuration says, else the longest."""
    lists = [module for module in trunk(model).modules() if isinstance(module, nn.ModuleList)]
    depth = _text_config(model).num_hidden_layers
    exact = [layers for layers in lists if len(layers) == depth]
    return list(exact[0] if exact else max(lists, key=len)) if lists else []


def is_encoder(model: nn.Module) -> bool:
    """True for a model that is bidirectional by itself (BERT, ModernBERT ...) and cannot be asked to be causal."""
    config = _text_config(model)
    masked_lm = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return masked_lm or getattr(config, "use_bidirectional_attention", None) in (True, "all")  # the second: EmbeddingGemma


def _text_config(model: nn.Module) -> Any:
    config: Any = trunk(model).config
    return config.get_text_config()


def hidden_states(
    model: nn.Module,
    input_ids: Int[Tensor, "B S"],
    attention_mask: Bool[Tensor, "B S"],
    *,
    is_causal: bool,
    sliding_window: SlidingWindow = "symmetric",
    segments: Int[Tensor, "B S"] | None = None,
) -> Float[Tensor, "B S D"]:
    """Last hidden states of the trunk, adapters included; padding may stand on either side and changes no real token's state.

    segments: where a text ends, and where what only sees it through special tokens begins (see `ullme.bottleneck`); causal.

    What a layer needs to know of the mode travels in its arguments, so recomputation under gradient checkpointing, after this
    call has returned, sees the same mode. States at padding have no meaning.

    Raises:
        ConfigError: an encoder model was asked to be causal, or flash attention for full attention in windowed layers.
    """
    inner: Any = trunk(model)
    encoder = is_encoder(model)
    if encoder and is_causal:
        raise ConfigError(
            f"backbone.attention: {type(inner).__name__} is an encoder and always bidirectional; set attention: bidirectional"
        )
    arguments = _arguments(inner, attention_mask, is_causal=is_causal, encoder=encoder)
    if segments is not None:
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        seen = bottleneck_mask(segments, attention_mask)
        arguments["attention_mask"] = model_masks(inner, seen, positions)
        if "position_ids" in inspect.signature(inner.forward).parameters:
            arguments["position_ids"] = positions
    if encoder:
        return inner(input_ids=input_ids, **arguments).last_hidden_state
    with _mode(inner, is_causal=is_causal, sliding_window=sliding_window, tokens=input_ids.shape[1]):
        return inner(input_ids=input_ids, **arguments).last_hidden_state


def _arguments(inner: Any, attention_mask: Tensor, *, is_causal: bool, encoder: bool) -> dict[str, Any]:
    """What goes into the trunk's forward beside the tokens."""
    config = inner.config.get_text_config()
    quirk = QUIRKS.get(config.model_type, Quirk())
    accepted = inspect.signature(inner.forward).parameters
    mask = expand_mask(attention_mask)
    arguments: dict[str, Any] = {}
    if "position_ids" in accepted and (mask is not None or quirk.positions_after_padding):
        first = inner.embeddings.padding_idx + 1 if quirk.positions_after_padding else 0
        arguments["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp_min(0) + first
    if mask is None and quirk.explicit_mask and not is_causal:
        mask = _everything_visible(inner, attention_mask)
    if not encoder:  # an encoder's sdpa would take is_causal=True at its word
        arguments |= {"is_causal": is_causal, "use_cache": False}
    return arguments | {"attention_mask": mask}


def _everything_visible(inner: Any, attention_mask: Tensor) -> Tensor | None:
    """A mask [1 1 S S] that hides nothing, as the attention implementation takes it; others make their own."""
    implementation = inner.config.get_text_config()._attn_implementation
    shape = (1, 1, attention_mask.shape[1], attention_mask.shape[1])
    if implementation == "sdpa":
        return torch.ones(shape, dtype=torch.bool, device=attention_mask.device)
    return torch.zeros(shape, dtype=inner.dtype, device=attention_mask.device) if implementation == "eager" else None


@contextmanager
def _mode(inner: Any, *, is_causal: bool, sliding_window: SlidingWindow, tokens: int) -> Iterator[None]:
    """The configuration that the trunk makes its masks from, as long as the block lasts.

    bloom and falcon ask only the configuration for `is_causal`. transformers' bidirectional window is |i - j| <= window where
    its causal one is i - j < window: one less makes both the same.
    """
    config = inner.config.get_text_config()
    changes: dict[str, Any] = {"is_causal": is_causal}
    window = getattr(config, "sliding_window", None)
    if window and not is_causal:
        if sliding_window == "full" and "flash" in config._attn_implementation:
            raise ConfigError(
                f"backbone.sliding_window: {config._attn_implementation} keeps the window of its layers; set sliding_window: "
                "symmetric, or attn_implementation: sdpa or eager"
            )
        changes["sliding_window"] = window - 1 if sliding_window == "symmetric" else max(window, tokens + 1)
    before = {name: getattr(config, name) for name in changes if hasattr(config, name)}
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name in changes:
            if name in before:
                setattr(config, name, before[name])
            else:
                delattr(config, name)


DROPOUTS = ("attention_dropout", "attn_dropout", "attn_dropout_p")
"""What attention modules call their dropout: a number, or a module that has it."""


@contextmanager
def attention_dropout(model: nn.Module, share: float) -> Iterator[None]:
    """The share of attention weights that is dropped in training, as long as the block lasts.

    Raises:
        ConfigError: the model's attention has no dropout that could be set.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for module in trunk(model).modules():
        names = DROPOUTS if not type(module).__name__.startswith("OPT") else ("dropout",)
        for name in names:
            value = getattr(module, name, None)
            owner, field = (value, "p") if isinstance(value, nn.Dropout) else (module, name)
            if "Attention" in type(module).__name__ and isinstance(getattr(owner, field, None), float | int):
                before.append((owner, field, getattr(owner, field)))
    if not before:
        raise ConfigError(f"{type(trunk(model)).__name__}: its attention has no dropout that could be set; set dropout: 0")
    try:
        for owner, field, _ in before:
            setattr(owner, field, share)
        yield
    finally:
        for owner, field, value in before:
            setattr(owner, field, value)


def check_attention_dropout(model: nn.Module) -> None:
    """Prove on these weights that `attention_dropout` drops something; the model is left as it was.

    Raises:
        ConfigError: it changes nothing (Falcon without ALiBi has no such dropout, whatever its configuration says).
    """
    ids = torch.arange(3, 3 + PROBE_TOKENS, device=next(model.parameters()).device).unsqueeze(0)
    found = []
    with _undisturbed(model), torch.no_grad():
        model.train()
        for share in (0.0, 0.5):
            torch.manual_seed(0)  # so that whatever else is dropped is the same
            with attention_dropout(model, share):
                found.append(hidden_states(model, ids, torch.ones_like(ids, dtype=torch.bool), is_causal=True))
        model.eval()
    if torch.equal(*found):
        raise ConfigError(
            f"{type(trunk(model)).__name__}: dropout of its attention changes nothing, so both passes of a text would be the same; "
            "use another attn_implementation, or objective gem"
        )


def expand_mask(mask: Tensor) -> Tensor | None:
    """The attention mask to hand to a model, or None when nothing is padded (the faster kernel)."""
    return None if bool(mask.all()) else mask.long()


# The proof


@dataclass(frozen=True)
class LayerAttention:
    """What one layer was seen to do when asked for bidirectional attention."""

    index: int
    kind: str
    """The configuration's word for it: full_attention, sliding_attention, linear_attention, conv, hybrid ..."""
    window: int | None
    """The configuration's sliding window, |i - j| < window in a decoder; None: all is seen."""
    bidirectional: bool


@dataclass(frozen=True)
class AttentionReport:
    """The layers of a model, lowest first."""

    name: str
    layers: tuple[LayerAttention, ...]

    @property
    def causal_layers(self) -> list[int]:
        """Indices of the layers that stay causal."""
        return [layer.index for layer in self.layers if not layer.bidirectional]

    def __str__(self) -> str:
        kinds = sorted({layer.kind for layer in self.layers if not layer.bidirectional})
        stay = f", layers {self.causal_layers} ({', '.join(kinds)}) stay causal" if kinds else ""
        return f"{self.name}: {len(self.layers) - len(self.causal_layers)} of {len(self.layers)} layers are bidirectional{stay}"


STAYS_CAUSAL = {
    "linear_attention": "linear attention or state space: causal by construction",
    "conv": "convolution: causal by construction",
    "chunked_attention": "transformers makes the masks of chunked attention causal",
}
"""Kinds of layers that have no other way, and why."""


def check_bidirectional(
    model: nn.Module, *, where_possible: bool = False, sliding_window: SlidingWindow = "symmetric"
) -> AttentionReport:
    """Prove the switch on these weights, with and without padding; the model is left as it was.

    where_possible: accept layers that have no other way (linear attention, convolution), as long as others are bidirectional.

    Raises:
        ConfigError: layers stay causal when asked not to be, see later tokens in causal mode, or see padding.
    """
    name, encoder = type(trunk(model)).__name__, is_encoder(model)
    try:
        with _undisturbed(model):
            later, padding = _seen(model, is_causal=False, sliding_window=sliding_window)
            forbidden, padding_causal = ([], []) if encoder else _seen(model, is_causal=True, sliding_window=sliding_window)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # modelling code that knows no other mode
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"backbone.attention: {name} does not run in the self-test ({reason}); use another attn_implementation, or "
            "attention: causal with pooling: last"
        ) from error
    report = AttentionReport(
        name, tuple(LayerAttention(i, *_kind(model, i, sliding_window), bool(seen)) for i, seen in enumerate(later))
    )
    problem = _problem(report, where_possible=where_possible)
    leaks = [index for index, seen in enumerate(forbidden) if seen]
    if leaks:
        problem = f"layers {leaks} see later tokens in causal mode; generation would be wrong"
    unmasked = sorted({index for seen in (padding, padding_causal) for index, leak in enumerate(seen) if leak})
    if unmasked:
        problem = f"layers {unmasked} see padding, so an embedding would depend on its batch; use another attn_implementation"
    if problem:
        raise ConfigError(f"backbone.attention: {name}: {problem}")
    return report


def check_bottleneck(model: nn.Module) -> None:
    """Prove on these weights that what follows special tokens sees a text through them alone; the model is left as it was.

    Raises:
        ConfigError: layers see more than the mask lets them, or less; names them.
    """
    name = type(trunk(model)).__name__
    mask = torch.ones(2, PROBE_TOKENS, dtype=torch.bool)
    mask[1, :2] = False
    kinds = [PREFIX] * (PROBE_TOKENS - 5) + [SPECIAL] * 2 + [SUFFIX] * 3
    segments = torch.tensor([kinds, kinds])
    expected = bottleneck_mask(segments, mask)
    wrong: set[int] = set()
    try:
        with _undisturbed(model):
            for position in (PROBE_TOKENS - 6, PROBE_TOKENS - 4, PROBE_TOKENS - 1):  # a token of each kind, the last of its kind
                reached = layer_reach(model, mask, position=position, is_causal=True, segments=segments)
                for index, found in enumerate(reached):
                    full = _kind(model, index, "symmetric")[1] is None
                    unseen = full and bool((expected[:, position] & ~found).any())
                    if unseen or bool((found & ~expected[:, position]).any()):
                        wrong.add(index)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"backbone.pooling: special: {name} does not take the mask of special tokens ({reason})") from error
    if wrong or not decoder_layers(model):
        raise ConfigError(
            f"backbone.pooling: special: {name}: layers {sorted(wrong)} do not keep to the mask of special tokens; use another "
            "attn_implementation, or pooling: last"
        )


def _problem(report: AttentionReport, *, where_possible: bool) -> str:
    """Why this is not bidirectional attention and what to do, or nothing."""
    stuck = [layer for layer in report.layers if not layer.bidirectional]
    unexplained = [layer.index for layer in stuck if layer.kind not in STAYS_CAUSAL]
    instead = "attention: causal with pooling: last"
    if not report.layers:
        return f"no layers were found, so nothing can be proven; use {instead}"
    if unexplained:
        return (
            f"layers {unexplained} stay causal under is_causal=False, so 'bidirectional' would be a lie; use another "
            f"attn_implementation, or {instead}"
        )
    mixed = len(stuck) < len(report.layers)
    if not stuck or (where_possible and mixed):
        return ""
    reasons = ", ".join(sorted({STAYS_CAUSAL[layer.kind] for layer in stuck}))
    choice = f"attention: bidirectional_where_possible, or {instead}" if mixed else instead
    return f"layers {report.causal_layers} stay causal ({reasons}); use {choice}"


def _kind(model: nn.Module, index: int, sliding_window: SlidingWindow) -> tuple[str, int | None]:
    """The configuration's word for a layer, and its window."""
    config = _text_config(model)
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    kind = types[index] if types else "sliding_attention" if window else "full_attention"
    return kind, window if "sliding" in kind and sliding_window == "symmetric" else None


def _seen(model: nn.Module, *, is_causal: bool, sliding_window: SlidingWindow) -> tuple[list[bool], list[bool]]:
    """Per layer: whether it saw a later token in every probe, and whether it saw padding in any.

    Two probes, which take different paths through a model: nothing padded (no mask at all), and padding on both sides.
    In causal mode a later token counts when seen in any.
    """
    full = torch.ones(1, PROBE_TOKENS, dtype=torch.bool)
    padded = torch.ones(2, PROBE_TOKENS, dtype=torch.bool)
    padded[0, :2] = padded[1, -2:] = False
    position = PROBE_TOKENS // 2 - 1
    later, padding = [], []
    for mask in (full, padded):
        seen = layer_reach(model, mask, position=position, is_causal=is_causal, sliding_window=sliding_window)
        real = [(layer & mask)[:, position + 1 :].any(1) for layer in seen]
        later.append([bool(rows.any() if is_causal else rows.all()) for rows in real])
        padding.append([bool((layer & ~mask).any()) for layer in seen])
    decide = any if is_causal else all
    return [decide(probes) for probes in zip(*later, strict=True)], [any(probes) for probes in zip(*padding, strict=True)]


def layer_reach(
    model: nn.Module,
    attention_mask: Bool[Tensor, "B S"],
    *,
    position: int,
    is_causal: bool,
    sliding_window: SlidingWindow = "symmetric",
    segments: Int[Tensor, "B S"] | None = None,
) -> list[Bool[Tensor, "B S"]]:
    """Per layer: True where the layer's input moves its output at `position`. Call it in evaluation mode."""
    device = next(model.parameters()).device
    rows, tokens = attention_mask.shape
    ids = torch.arange(3, 3 + tokens, device=device).expand(rows, tokens)
    mask = attention_mask.to(device)
    parts = None if segments is None else segments.to(device)

    def forward() -> None:
        hidden_states(model, ids, mask, is_causal=is_causal, sliding_window=sliding_window, segments=parts)

    return reach(decoder_layers(model), forward, position=position)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (dropout would look like a leak); modes and random state are as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices), torch.inference_mode(False):
            yield
    finally:
        for module in training:
            module.training = True
