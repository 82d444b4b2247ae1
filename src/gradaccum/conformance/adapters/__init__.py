"""Trainers, each one function: ``train(model, optimizer, loss, batches, *, micro_batches, epochs, ...)``.

| file | idea |
| --- | --- |
| `loops.py` | loops that the user writes: the textbook's, Accelerate's, Fabric's |
| `trainers.py` | Lightning's, Transformers' and Ignite's |
| `library.py` | this library, and the same trainers made exact |
"""
