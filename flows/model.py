"""The MLflow models-from-code wrapper of a release: texts in, embeddings out. It holds references, no bytes and no pickle."""

from __future__ import annotations

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from flows.retriever import Release, Retriever

__all__ = ["RetrieverModel"]


class RetrieverModel(PythonModel):
    """`predict(texts)` gives the embedding of each query text, [N][D], unit norm."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open model and index of the release, verified."""
        self.retriever = Retriever.open(Release.read(context.artifacts["release"]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # mlflow reads the signature from these hints
        self, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[list[float]]:
        """Embeddings of query texts."""
        del params
        return self.retriever.embed(model_input).tolist()


set_model(RetrieverModel())
