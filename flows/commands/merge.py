"""`ullme merge`: several trained models of one LLM into one whose weights lie between theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ullme.errors import ConfigError

__all__ = ["MERGE_EXAMPLES", "merge_command"]

MERGE_EXAMPLES = """Why:

  Train one LLM several times on the same data, with another seed or another
  learning rate, or keep several checkpoints of one training. Their average
  is often better than each of them, and costs no more to use: published
  ablations of embedding models report +0.8 to +2.5 points (the idea: model
  soups, arXiv 2203.05482). It works because all start from the same weights:
  other architectures are refused, another base is warned of. We have not
  measured the gain ourselves; measure yours on your own queries, against
  each parent.

  average   the weighted mean of each tensor; for two models and more
  slerp     the point on the arc between two models, tensor by tensor: it
            keeps lengths, which a mean of distant models shortens

Examples:

  ullme merge seed-0 seed-1 seed-2 --out soup
  ullme merge general ours --out both --weights .3,.7
  ullme merge general ours --out both --method slerp --t .7
"""


def merge_command(
    *folders: Annotated[Path, Parameter(help="Two or more model folders, as training, `ullme push` or `Encoder.save` write them.")],
    out: Annotated[Path, Parameter(help="New folder of the merged model.")],
    method: Annotated[Literal["average", "slerp"], Parameter(help="How the weights are put together; see below.")] = "average",
    weights: Annotated[
        str, Parameter(help="How much each folder counts, in their order: .5,.5 or 2,1,1; the default: alike.")
    ] = "",
    t: Annotated[
        float | None, Parameter(help="For slerp of two folders: how far from the first (0) to the second (1); the default: .5.")
    ] = None,
) -> int:
    """Merge models that were trained from the same LLM: one model, at the price of one, often better than each.

    Settings, tokenizer and prompts must agree, and are those of the first folder, as is the number type. Nothing is trained;
    memory stays small, since one tensor of each model is worked on at a time. The card of the new folder names its parents.
    """
    if len(folders) < 2:
        raise ConfigError(f"merge: expected at least two model folders, got {len(folders)}; name those to merge, then --out NEW")
    shares = _shares(len(folders), method, weights, t)
    from ullme.merging import Recipe, merge

    recipe = Recipe(method, shares)
    merged = merge(folders, out, recipe)
    print(
        f"written: {recipe}, to {out}: {merged.tensors} tensors, {merged.size / 1e6:.1f} MB; SentenceTransformer('{out}') and "
        f"Encoder.load('{out}') open it"
    )
    return 0


def _shares(count: int, method: str, weights: str, t: float | None) -> tuple[float, ...]:
    """One weight per folder, from `--weights` or `--t`.

    Raises:
        ConfigError: they do not fit each other, the method or the folders.
    """
    if t is not None:
        if method != "slerp" or count != 2:
            raise ConfigError(f"--t: expected --method slerp and two folders, got {method} of {count}; use --weights")
        if weights:
            raise ConfigError("--t: expected either --t or --weights, got both; --t .7 is --weights .3,.7")
        if not 0 <= t <= 1:
            raise ConfigError(f"--t: expected a number from 0 (the first folder) to 1 (the second), got {t:g}")
        return 1 - t, t
    if not weights:
        return (1.0,) * count
    try:
        shares = tuple(float(part) for part in weights.split(","))
    except ValueError:
        shares = ()
    if len(shares) != count:
        raise ConfigError(
            f"--weights: expected {count} numbers, one per folder, such as {','.join(['1'] * count)}; got '{weights}'"
        )
    return shares
