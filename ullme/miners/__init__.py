"""How hard negatives are chosen: one file per kind, each with one public `Miner`."""
