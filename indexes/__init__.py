"""FAISS indexes of encoded corpora. Only `index.py` and `_faiss.py` call faiss; vectors come and go as numpy arrays.

Every other module here is a kind: a frozen value with its fields, its factory string and its search parameters.
"""

NOT_KINDS = ("index",)
