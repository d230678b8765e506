"""`ullme encode`: a file of texts through a model, into a folder of vectors; several machines may share the work."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter, validators

from ullme.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from ullme.encoding import Encoded, EncodeJob

__all__ = ["ENCODE_EXAMPLES", "encode_command"]

AT_LEAST_1 = validators.Number(gte=1)
ENCODE_EXAMPLES = """Examples:

  ullme encode --model my-model --input corpus.jsonl --output vectors
  ullme encode --model my-model --input questions.txt --output asked \\
      --prompt query

On four machines that share a disk, each a quarter (1/4, 2/4, 3/4, 4/4):

  ullme encode --model my-model --input corpus.parquet --output vectors \\
      --shard 1/4

`ullme.encoding.open_embeddings` reads what is in the folder, once all of it is
there.
"""


def encode_command(
    *,
    model: Annotated[Path, Parameter(help="Folder of the model, as training or `Encoder.save` wrote it.")],
    input_: Annotated[
        Path,
        Parameter(name="--input", help="The texts: .txt (one a line), .jsonl ({id, text, title} a line) or .parquet (the same)."),
    ],
    output: Annotated[Path, Parameter(help="Folder of the vectors. What is finished there is kept, the rest is encoded.")],
    shard: Annotated[str, Parameter(help="i/N: do every N-th shard, from the i-th; N such commands make the whole.")] = "1/1",
    prompt: Annotated[Literal["document", "query"], Parameter(help="Whose prompt stands before the texts.")] = "document",
    batch_tokens: Annotated[
        int, Parameter(validator=AT_LEAST_1, help="Padded tokens per forward pass; halved where they do not fit.")
    ] = 16_384,
    shard_rows: Annotated[
        int, Parameter(validator=AT_LEAST_1, help="Texts per shard: what a crash costs at most; the same everywhere.")
    ] = 50_000,
    processes: Annotated[str, Parameter(help="How many share the work here; auto: one per GPU, or one.")] = "auto",
) -> int:
    """Encode a file of texts: fp16 vectors in shards, each with its ids (Arrow) and a JSON sidecar that is written last.

    An interrupted command goes on where it was when it is given again.
    """
    from flows.child import ENVIRONMENT
    from ullme.encoding import Encoded, EncodeJob, EncodeRuntime
    from ullme.publishing import model_fingerprint
    from ullme.text_file import TextFile
    from ullme.workers import encode_in_workers

    part, parts = _part(shard)
    runtime = {"batch_tokens": batch_tokens, "shard_rows": shard_rows, "processes": _processes(processes)}
    fingerprint = model_fingerprint(model)
    file = TextFile.open(input_)
    job = EncodeJob(
        model=model,
        fingerprint=fingerprint,
        corpus=file.path,
        count=file.count,
        out=output,
        runtime=EncodeRuntime.model_validate(runtime),
        role=prompt,
        input=file.digest,
        part=part - 1,
        parts=parts,
    )
    _check_folder(job)
    output.mkdir(parents=True, exist_ok=True)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    _log_plainly()
    encoded = encode_in_workers(job) if job.numbers else Encoded()
    _report(job, encoded)
    return 0


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise ConfigError(f"--shard: expected i/N with i from 1 to N, such as 2/4, got '{text}'")
    return int(number), int(of)


def _processes(text: str) -> str | int:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ConfigError(f"--processes: expected auto or a number from 1, got '{text}'")
    return text if text == "auto" else int(text)


def _check_folder(job: EncodeJob) -> None:
    """Refuse to write over the vectors of another model or another input."""
    from ullme.shards import sidecars

    for number, sidecar in sidecars(job.out).items():
        for key, value, words in (("fingerprint", job.fingerprint, "model"), ("input", job.input, "input file")):
            if sidecar.get(key) != value:
                raise ArtifactError(
                    f"{job.out}: shard {number} there was made from another {words}; name another --output, or delete the folder"
                )


def _report(job: EncodeJob, encoded: Encoded) -> None:
    """What is there now, and what other parts have yet to do.

    Raises:
        ArtifactError: a shard of this part is not there.
    """
    from ullme.shards import sidecars

    found = sidecars(job.out)
    missing = [number for number in job.numbers if number not in found]
    if missing:
        raise ArtifactError(f"{job.out}: shard {missing[0]} was written and is gone; run the same command again")
    mine = [found[number] for number in job.numbers]
    rows, cut, tokens, lost = (sum(sidecar[name] for sidecar in mine) for name in ("rows", "truncated", "tokens", "lost"))
    print(
        f"{job.out}: {rows} texts in {len(mine)} of {job.shards} shards, {encoded.texts} encoded now; "
        f"{100 * cut / max(1, rows):.1f}% of the texts are cut, {100 * lost / max(1, tokens):.1f}% of the text is lost"
    )
    left = sorted({f"{number % job.parts + 1}/{job.parts}" for number in range(job.shards) if number not in found})
    if left:
        print(f"still to come: --shard {', '.join(left)}")


def _log_plainly() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ullme").setLevel(logging.INFO)
