"""Where corpora and queries come from: one file per kind, each with one public `Source`."""
