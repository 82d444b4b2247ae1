"""Weight gradients that are added up in place: ``grad += dy^T x`` in one GEMM, and not a temporary that is then added.

| file | idea |
| --- | --- |
| `backward.py` | a backward that leaves such parameters out, and adds their gradients by hooks on the nodes |
| `parameter_uses.py` | the gradient of each kind of use, from what its node has saved |
| `product.py` | the addition, in every mixture of dtypes, and the memory that the first one writes to |
| `choice.py` | the option: for which parameters it pays |

Convolutions are left to torch: their kernels for weight gradients cannot add to what is there, and their parameters are
small beside what they are applied to. So are norms and biases: vectors, whose sums cost nothing.
"""
