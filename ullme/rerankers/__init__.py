"""What puts the best answers of a search in a better order: one file per kind, each with one public `Reranker`."""
