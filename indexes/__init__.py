"""FAISS indexes of encoded corpora: `build.py` makes them, `index.py` searches them; vectors come and go as numpy arrays.

Every other module here is a kind: a frozen value with its fields, its factory string and its search parameters.
"""

NOT_KINDS = ("build", "index", "kind")
