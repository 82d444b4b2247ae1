"""Where gradients add up, and in what.

| file | idea |
| --- | --- |
| `gradient_sum.py` | gradients add up in ``.grad``: nothing was there before, and nobody changes it in between |
| `graph.py` | which operations use a parameter, read off the graph before the backward |
| `others_parameters.py` | those that a window's losses go through stay as they are until it closes |
| `given_backward.py` | a backward that a function of somebody else's runs |
| `fused/` | weight gradients are added in place |
| `gradient_buffers.py` | fp32 sums for low precision; the same memory in every window, for CUDA graphs |
"""
