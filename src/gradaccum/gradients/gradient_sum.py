"""Gradients add up in ``.grad``, as torch's own backward leaves them.

What this adds to torch's accumulation are the two questions that decide whether the sum is right: was anything there
before the window began, and did anything change it between two micro-batches? The second is answered by one gradient's
version counter, which every in-place operation moves: clipping by hand, zeroing and unscaling touch all gradients, so
one of them is enough to look at.

Options change how gradients add up, not what: in place (`fused`), in fp32 or in memory that stays
(`gradient_buffers`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradaccum.errors import MisuseError, UnsupportedError
from gradaccum.gradients.fused.backward import FusedBackward
from gradaccum.gradients.fused.choice import FusedOption, choice_of
from gradaccum.gradients.given_backward import BackwardFunction, gradients_kept, run_given_backward
from gradaccum.gradients.gradient_buffers import PersistentGradients, WideGradients
from gradaccum.gradients.graph import Graph, read_graph, run_backward
from gradaccum.gradients.others_parameters import OthersParameters
from gradaccum.norms import combined, norms

_MAX_SHOWN = 3


class GradientSum:
    """The ``.grad`` of the models' parameters, over one window after another.

    Args:
        named_parameters: every parameter of the models, frozen ones too: they may be unfrozen while training.
        fused: for which parameters gradients are added in place; False for none, as torch does it.
        accumulate_dtype: the dtype in which gradients of low precision add up; None for their own.
        persistent: whether gradients lie in the same memory in every window.
        has_shards: whether parameters are shards of FSDP2, which are leaves of no graph: FSDP2 brings their gradients
            over from whole parameters of its own.
        backward: what runs the backwards, in the place of torch's engine; then nothing is added in place.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        fused: FusedOption = False,
        accumulate_dtype: torch.dtype | None = None,
        persistent: bool = False,
        has_shards: bool = False,
        backward: BackwardFunction | None = None,
    ) -> None:
        self._named = list(named_parameters)
        self.parameters = [parameter for _, parameter in self._named]
        self._backward = backward
        choice = choice_of(fused) if backward is None else None
        in_place = None if choice is None else FusedBackward(self.parameters, choice)
        self._fused = in_place if in_place is not None and in_place.has_candidates else None
        self._wide = None if accumulate_dtype is None else WideGradients(self.parameters, accumulate_dtype)
        self._persistent = PersistentGradients(self.parameters) if persistent else None
        self._has_shards = has_shards
        self._reads_all = self._is_to_be_read = True
        self._is_open = False
        self._reaches_others = False
        self._others = OthersParameters()
        self._own = frozenset(id(parameter) for parameter in self.parameters)
        self._watched: nn.Parameter | None = None
        self._watched_gradient: Tensor | None = None
        self._watched_version = 0

    def begin(self, *, is_for_update: bool = True) -> None:
        """Starts a window.

        Args:
            is_for_update: whether an optimizer is to step with the sum; if not, it is to be the gradient in ``.grad``.

        Raises:
            MisuseError: a gradient is there already, which the window would be added to.
        """
        self.check_empty()
        self._is_open = self._is_to_be_read = True
        self._others.begin()
        if self._wide is not None:
            self._wide.begin()
        if self._persistent is not None:  # after the sums have their dtype
            self._persistent.begin(keeps=is_for_update)
            self._watch()  # cleared before the first backward, they would not be there for it

    def read_all(self) -> None:
        """Has every graph of the open window, or of the next one, looked through for other models' parameters."""
        self._reads_all = self._is_to_be_read = True

    def check_empty(self) -> None:
        """Checks that no gradient is left over from something else; gradients of zero are removed.

        Raises:
            MisuseError: a gradient is there already, which the window would be added to.
        """
        if self._refuse_left():
            self.clear()

    def _refuse_left(self) -> bool:
        """Refuses gradients left over from something else; whether there are some of zero."""
        left = [(name, parameter) for name, parameter in self._named if parameter.grad is not None]
        if not left:
            return False
        nonzero = [name for name, parameter in left if _has_nonzero(parameter.grad)]
        if nonzero:
            shown = ", ".join(nonzero[:_MAX_SHOWN]) + (", ..." if len(nonzero) > _MAX_SHOWN else "")
            raise MisuseError(
                f"{len(nonzero)} of {len(self._named)} parameters have a .grad before the window's first micro-batch "
                f"({shown}). The window's gradient would be added to it, and the update would be that of neither. "
                "Call optimizer.zero_grad() before training starts, and keep other backward() calls out of it."
            )
        return True

    def add(
        self,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        *,
        also: Sequence[Tensor] = (),
        only: Sequence[Tensor] | None = None,
        reads: bool = False,
    ) -> None:
        """Runs the backward of one micro-batch.

        Args:
            roots: where it starts.
            seeds: the gradients it starts with.
            also: leaves besides the parameters that get gradients.
            only: the leaves that get gradients, where these are not the parameters.
            reads: whether the graph is read whatever has been read before: it is of another kind.

        Raises:
            MisuseError: the gradients were changed since the micro-batch before.
            UnsupportedError: the loss reaches another model's parameters through a reentrant checkpoint.
        """
        self._check_unchanged()
        inputs: Sequence[Tensor] | None = only
        if only is None and not self._has_shards:
            graph = read_graph(roots) if reads or self._fused is not None or self._is_to_be_read else None
            if graph is not None:
                self._look_for_others(graph)
            if self._reaches_others:
                self._others.check()
                inputs = [*(parameter for parameter in self.parameters if parameter.requires_grad), *also]
            among = None if inputs is None else frozenset(map(id, inputs))
            if graph is not None and self._fused is not None and self._fused.run(roots, seeds, among, graph):
                self._watch()
                return
        if inputs is None or inputs:  # the engine would read no inputs as "all leaves"
            if self._backward is None:
                run_backward(roots, seeds, inputs or ())
            else:
                self._run_given(self._backward, roots, seeds, inputs)
        self._watch()

    def _run_given(
        self,
        backward: BackwardFunction,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        inputs: Sequence[Tensor] | None,
    ) -> None:
        """Runs a backward for ``inputs`` alone, None for all leaves, through a function that reaches all of them."""
        others: list[Tensor] = []
        if inputs is not None:
            wanted = frozenset(map(id, inputs))
            reached = {id(leaf): leaf for leaf in (*self.parameters, *read_graph(roots).leaves.values())}
            others = [leaf for key, leaf in reached.items() if key not in wanted]
        with gradients_kept(others):
            run_given_backward(backward, roots, seeds)

    def _look_for_others(self, graph: Graph) -> None:
        """Finds out whether a backward would reach another model's parameters too; if so, all are restricted to ours.

        In a GAN the generator's loss goes through the discriminator, whose gradients another accumulator counts. Every
        graph of a pass's first window is read, and of each other window the first one: 0.5 us a node. (Restricting all
        backwards unread would take 48 us more each, seen with a graph of five nodes.)
        """
        self._is_to_be_read = self._reads_all
        leaves = graph.leaves.values()
        others = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter) and id(leaf) not in self._own]
        self._others.note(others)
        reaches_others = bool(others)
        reentrant = [node for node in graph.checkpoints if node.name() == "CheckpointFunctionBackward"]
        for node in reentrant:  # its graph is made in the backward; of its parameters only a module's are known
            function = getattr(node, "run_function", None)
            module = getattr(function, "__self__", function)
            if isinstance(module, nn.Module):
                reaches_others |= any(id(parameter) not in self._own for parameter in module.parameters())
        if reaches_others and reentrant:
            raise UnsupportedError(
                "The loss reaches parameters of a model that is not this accumulator's, and a reentrant checkpoint, "
                "for which torch cannot restrict a backward to some parameters. Their gradients would get what is not "
                "theirs. Use torch.utils.checkpoint(..., use_reentrant=False)."
            )
        self._reaches_others |= reaches_others

    def multiply(self, factor: float) -> None:
        """Multiplies the sum so far."""
        for parameter in self.parameters:
            if parameter.grad is not None and not self._is_untouched(parameter):
                parameter.grad.mul_(factor)
        self._watch()

    def norm(self, among: Iterable[nn.Parameter]) -> Tensor:
        """The 2-norm of the sum so far, 0-d, over some of the parameters."""
        there = [p.grad for p in among if p.grad is not None and not self._is_untouched(p)]
        return combined(norms([g.coalesce().values() if g.is_sparse else g for g in there], 2.0), 2.0)

    def filled(self, among: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Which of some parameters got a gradient; the others have none. Sparse ones are coalesced in passing."""
        if self._persistent is not None:
            for parameter in self.parameters:
                if self._is_untouched(parameter):
                    parameter.grad = None
        found: list[nn.Parameter] = []
        for parameter in among:
            gradient = parameter.grad
            if gradient is not None:
                found.append(parameter)
                if gradient.is_sparse and not gradient.is_coalesced():
                    parameter.grad = gradient.coalesce()
        return found

    def narrow(self) -> None:
        """Gives the sums the dtype of their parameters, which is what optimizers and users expect."""
        if self._wide is not None:
            self._wide.narrow()

    def clear(self, *, keeps_memory: bool = False) -> None:
        """Ends the window: no parameter keeps a gradient.

        With ``keeps_memory`` the next window may write its gradients where these were.
        """
        if self._fused is not None:
            self._fused.end(keeps_memory=keeps_memory and self._wide is None and self._persistent is None)
        if self._is_open:
            self._is_open = self._reads_all = False
        for parameter in self.parameters:
            parameter.grad = None
        if self._wide is not None:
            self._wide.end()
        if self._persistent is not None:
            self._persistent.end()
        self._watched = self._watched_gradient = None

    def set_aside(self) -> list[Tensor | None]:
        """Takes the gradients away, to be put back with `put_back`."""
        aside = [parameter.grad for parameter in self.parameters]
        self.clear()
        return aside

    def put_back(self, aside: Sequence[Tensor | None]) -> None:
        """Adds the gradients that were set aside to those there now, as torch's own backward would have."""
        for parameter, before in zip(self.parameters, aside, strict=True):
            now = parameter.grad
            if before is None:
                continue
            if now is None:
                parameter.grad = before
            else:  # a sparse tensor can be added to a dense one, not the other way round
                parameter.grad = now.add_(before) if before.is_sparse and not now.is_sparse else before.add_(now)
        self._watched = self._watched_gradient = None

    def _is_untouched(self, parameter: nn.Parameter) -> bool:
        return self._persistent is not None and self._persistent.is_untouched(parameter)

    def _watch(self) -> None:
        gradient = None if self._watched is None else self._watched.grad
        if gradient is None:
            self._watched = None
            for parameter in self.parameters:
                gradient = parameter.grad
                if gradient is not None:
                    self._watched = parameter
                    break
        if gradient is not None:
            self._watched_gradient, self._watched_version = gradient, gradient._version

    def _check_unchanged(self) -> None:
        watched, gradient = self._watched, self._watched_gradient
        if watched is None or gradient is None:
            if self._refuse_left():  # of a backward by hand, before the window's first
                for parameter in self.parameters:
                    parameter.grad = None
            return
        if watched.grad is gradient and gradient._version == self._watched_version:
            return
        name = next(name for name, parameter in self._named if parameter is watched)
        what = "cleared" if watched.grad is None else "changed"
        raise MisuseError(
            f"The gradient of {name!r} was {what} between two micro-batches of one window, so the sum would no longer "
            "be the batch's gradient. Inside a window call neither zero_grad() nor clip_grad_norm_() nor backward(): "
            "pass clip_norm= and return all terms of the loss to accumulator.backward()."
        )


def _has_nonzero(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.any())
