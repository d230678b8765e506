"""FAISS indexes of encoded corpora. faiss is imported in `indexes/index.py` only; vectors come and go as numpy arrays.

Every other module here is a kind: a frozen value with its fields, its factory string and its search parameters.
"""

NOT_KINDS = ("index",)
