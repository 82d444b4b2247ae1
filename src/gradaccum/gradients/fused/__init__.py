"""Weight gradients that are added up in place: ``grad += dy^T x`` in one GEMM, and not a temporary that is then added.

| file | idea |
| --- | --- |
| `backward.py` | a backward that leaves such weights out, and adds their gradients by hooks on the nodes |
| `linear.py`, `embedding.py` | the gradient of each kind of use |
| `product.py` | the addition, in every mixture of dtypes |
| `saved.py` | what a node has saved, read without taking it away |
| `gradient_memory.py` | one window's gradients written where the last window's were |
| `choice.py` | the option: for which weights it pays |

Convolutions are left to torch: their kernels for weight gradients cannot add to what is there, and their weights are
small beside what they are applied to. So are norms and biases: vectors, whose sums cost nothing.
"""
