"""What BatchNorm's statistics are taken over: the whole batch, fixed groups, or nothing that is seen now.

| file | idea |
| --- | --- |
| `intercept.py` | training-mode batch norms are handed to whoever takes them over, while held |
| `moments.py` | mean and variance of a piece, normalising by given ones, and merging: autograd functions |
| `exact.py` | statistics of the whole batch, for micro-batches that meet at every layer |
| `ghost.py` | statistics of fixed groups of samples |
| `frozen.py` | running statistics normalise, and stay |
| `find.py` | the layers' names, and those that cannot be taken over |
"""
