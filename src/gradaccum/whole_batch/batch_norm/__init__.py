"""What BatchNorm's statistics are taken over: the whole batch, fixed groups, or nothing that is seen now.

| file | idea |
| --- | --- |
| `layers.py` | the layers' calls, names and counts, those that cannot be seen; frozen ones |
| `moments.py` | mean and variance of a piece, normalising by given ones, and merging: autograd functions |
| `exact.py` | statistics of the whole batch, for micro-batches that meet at every layer |
| `ghost.py` | statistics of fixed groups of samples |
"""
