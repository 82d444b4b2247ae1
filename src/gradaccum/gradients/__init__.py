"""Where gradients add up.

| file | idea |
| --- | --- |
| `dot_grad.py` | in ``.grad``, watched: nothing was there before, nobody changes it in between |
| `options.py` | how they add up, as the user wants it |
| `fused/` | weight gradients are added in place |
| `wide.py` | low precision is added up in fp32 |
| `persistent.py` | the sum is in the same memory in every window |
| `momentum.py` | the sum is kept in SGD's momentum buffers |
| `casts.py` | weights are cast under autocast once a window |
"""
