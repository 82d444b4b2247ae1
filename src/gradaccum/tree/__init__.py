"""Nested batches: how they are made up, how many samples they have, and pieces of them."""

from gradaccum.tree.layout import Layout as Layout
from gradaccum.tree.layout import read as read
from gradaccum.tree.layout import rows as rows
from gradaccum.tree.layout import rows_of as rows_of
from gradaccum.tree.layout import rows_or_none as rows_or_none
from gradaccum.tree.nesting import leaves as leaves
from gradaccum.tree.nesting import map_leaves as map_leaves
from gradaccum.tree.nesting import named_leaves as named_leaves
from gradaccum.tree.nesting import tensors as tensors
from gradaccum.tree.nesting import to_device as to_device
from gradaccum.tree.parts import Axes as Axes
from gradaccum.tree.taking import take as take
