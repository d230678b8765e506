"""Answer a question with one LLM: it finds the passages with the released index, then writes the answer from them.

python examples/rag.py "how do I copy a directory tree?" --config configs/quickstart.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.config import load
from flows.registry import Registry
from flows.retriever import Retriever
from ullme.errors import UllmeError

PROMPT = "Answer the question from these passages alone, in one or two sentences.\n\n{passages}\n\nQuestion: {question}"


def main() -> None:
    """Retrieve, then generate, with the same weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="of the run that made the release")
    parser.add_argument("--passages", type=int, default=3)
    arguments = parser.parse_args()
    config = load(arguments.config)
    version = Registry.at(config.tracking, config.store).holder("champion")
    if version is None:
        raise SystemExit(f"nothing is released yet: ullme run train-and-index --config {arguments.config}")
    retriever = Retriever.open(version.release)
    (hits,) = retriever.search([arguments.question], k=arguments.passages)
    passages = "\n\n".join(f"[{hit.rank}] {hit.excerpt}" for hit in hits)
    prompt = PROMPT.format(passages=passages, question=arguments.question)
    (answer,) = retriever.encoder.generate([prompt], chat=True, max_new_tokens=96)
    print(answer.strip(), "\n\nfrom", ", ".join(hit.id for hit in hits))


if __name__ == "__main__":
    try:
        main()
    except UllmeError as error:
        raise SystemExit(str(error)) from None
