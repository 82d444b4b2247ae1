"""Gradients add up in ``.grad``, as torch's own backward leaves them.

What this adds to torch's accumulation are the two questions that decide whether the sum is right: was anything there
before the window began, and did anything change it between two micro-batches? The second is answered by one gradient's
version counter, which every in-place operation moves: clipping by hand, zeroing and unscaling touch all gradients, so
one of them is enough to look at.

Options change how they add up, not what: weight gradients in place (`fused`), low precision in fp32 (`wide`), in the
optimizer's momentum (`momentum`), in memory that stays (`persistent`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from gradaccum.errors import MisuseError, UnsupportedError
from gradaccum.gradients.fused.backward import FusedBackward
from gradaccum.gradients.graph import Graph, read_graph
from gradaccum.gradients.momentum import MomentumSums
from gradaccum.gradients.options import GradientOptions
from gradaccum.gradients.persistent import PersistentGradients
from gradaccum.gradients.wide import WideSums

_MAX_SHOWN = 3
_AS_TORCH = GradientOptions(fused=False)


class DotGrad:
    """The ``.grad`` of the models' parameters, over one window after another.

    Args:
        named_parameters: every parameter of the models, frozen ones too: they may be unfrozen while training.
        options: how they add up; by default as torch does it.
        optimizers: whose momentum they may add up in.

    Attributes:
        momentum: what adds up in momentum buffers; None where gradients have memory of their own.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        options: GradientOptions = _AS_TORCH,
        *,
        optimizers: Sequence[Optimizer] = (),
    ) -> None:
        self._named = list(named_parameters)
        self.parameters = [parameter for _, parameter in self._named]
        self.momentum = MomentumSums(optimizers) if options.into_momentum else None
        prepare = None if self.momentum is None else self.momentum.prepare
        in_place = None if options.choice is None else FusedBackward(self.parameters, options.choice, prepare)
        self._fused = in_place if in_place is not None and in_place.has_candidates else None
        dtype = options.accumulate_dtype
        self._wide = None if dtype is None else WideSums(self.parameters, dtype)
        self._persistent = PersistentGradients(self.parameters) if options.persistent else None
        self._own = frozenset(id(parameter) for parameter in self.parameters)
        self._only_own: list[nn.Parameter] | None = None
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
        for parameter in self.parameters:
            if parameter.grad is not None:
                self.check_empty()
                break
        if self._wide is not None:
            self._wide.begin()
        if self.momentum is not None and is_for_update:
            self.momentum.begin()
        if self._persistent is not None:  # after the sums have their dtype
            self._persistent.begin(keeps=is_for_update)
            self._watch()  # cleared before the first backward, they would not be there for it

    def check_empty(self) -> None:
        """That no gradient is left over from something else; gradients of zero are removed.

        Raises:
            MisuseError: a gradient is there already, which the window would be added to.
        """
        left = [(name, parameter) for name, parameter in self._named if parameter.grad is not None]
        if not left:
            return
        nonzero = [name for name, parameter in left if _count_nonzero(parameter.grad)]
        if nonzero:
            shown = ", ".join(nonzero[:_MAX_SHOWN]) + (", ..." if len(nonzero) > _MAX_SHOWN else "")
            raise MisuseError(
                f"{len(nonzero)} of {len(self._named)} parameters have a .grad before the window's first micro-batch "
                f"({shown}). The window's gradient would be added to it, and the update would be that of neither. "
                "Call optimizer.zero_grad() before training starts, and keep other backward() calls out of it."
            )
        self.clear()

    def look_for_foreign_leaves(self, roots: Sequence[Tensor]) -> Graph:
        """Finds out whether a backward would also reach parameters of other models, and if so leaves these alone.

        In a GAN the generator's loss goes through the discriminator, whose gradients another accumulator counts.
        The graph is read in Python, so this is asked for in the first window of a pass, not always.

        Returns:
            The graph, for `add`.
        """
        graph = read_graph(roots)
        others = [leaf for leaf in graph.leaves.values() if id(leaf) not in self._own]
        foreign = any(isinstance(leaf, nn.Parameter) for leaf in others)
        reentrant = [node for node in graph.checkpoints if node.name() == "CheckpointFunctionBackward"]
        for node in reentrant:  # its graph is made in the backward; of its parameters only a module's are known
            function = getattr(node, "run_function", None)
            module = getattr(function, "__self__", function)
            if isinstance(module, nn.Module):
                foreign = foreign or any(id(parameter) not in self._own for parameter in module.parameters())
        if foreign and reentrant:
            raise UnsupportedError(
                "The loss reaches parameters of a model that is not this accumulator's, and a reentrant checkpoint, "
                "for which torch cannot restrict a backward to some parameters. Their gradients would get what is not "
                "theirs. Use torch.utils.checkpoint(..., use_reentrant=False)."
            )
        if foreign:  # and from now on: later losses may go through it again
            self._only_own = self.parameters
        return graph

    def add(
        self,
        roots: tuple[Tensor, ...],
        seeds: tuple[Tensor, ...],
        *,
        also: Sequence[Tensor] = (),
        only: Sequence[Tensor] | None = None,
        graph: Graph | None = None,
    ) -> None:
        """Runs the backward of one micro-batch.

        Args:
            roots: where it starts.
            seeds: the gradients it starts with.
            also: leaves besides the parameters that get gradients.
            only: the leaves that get gradients, where these are not the parameters.
            graph: of the roots, where it has been read.

        Raises:
            MisuseError: the gradients were changed since the micro-batch before.
        """
        watched, gradient = self._watched, self._watched_gradient
        if (
            watched is not None
            and gradient is not None
            and (watched.grad is not gradient or gradient._version != self._watched_version)
        ):
            raise self._changed(watched)
        inputs: tuple[Tensor, ...] = () if only is None else tuple(only)
        if only is None and self._only_own is not None:
            inputs = (*(parameter for parameter in self._only_own if parameter.requires_grad), *also)
            if not inputs:  # which the engine would read as "all leaves"
                return
        if only is not None and not inputs:
            return
        if self._fused is not None and only is None:
            own = None if self._only_own is None else self._own.union(map(id, also))
            if self._fused.run(roots, seeds, own, graph):
                self._watch()
                return
        # What torch.autograd.backward ends in. Its checks of the seeds, which are right by construction here, take as
        # long as the backward of a small model: 26 of 54 us were seen for three nodes.
        Variable._execution_engine.run_backward(
            roots, seeds, False, False, inputs, allow_unreachable=True, accumulate_grad=True
        )
        if watched is None or gradient is None or watched.grad is not gradient:
            self._watch()
        else:
            self._watched_version = gradient._version

    def multiply(self, factor: float) -> None:
        """Multiplies the sum so far."""
        assert self.momentum is None or not self.momentum.is_open, "what is in the momentum cannot be rescaled"
        for parameter in self.parameters:
            if parameter.grad is not None and not self._is_untouched(parameter):
                parameter.grad.mul_(factor)
        self._watch()

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

    def stepping(self) -> AbstractContextManager[None]:
        """Held while the optimizers step."""
        return nullcontext() if self.momentum is None else self.momentum.stepping()

    def skip(self) -> None:
        """There was no step, as the gradient is not finite."""
        if self.momentum is not None:
            self.momentum.skip()

    def clear(self, *, keeps_memory: bool = False) -> None:
        """Ends the window: no parameter keeps a gradient.

        Args:
            keeps_memory: whether the next window may write its gradients where these were.
        """
        if self._fused is not None:
            has_own_memory = self._wide is None and self.momentum is None and self._persistent is None
            self._fused.keep_memory() if keeps_memory and has_own_memory else self._fused.free_memory()
        for parameter in self.parameters:
            parameter.grad = None
        if self._wide is not None:
            self._wide.end()
        if self.momentum is not None:
            self.momentum.end()
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

    def _changed(self, watched: nn.Parameter) -> MisuseError:
        name = next(name for name, parameter in self._named if parameter is watched)
        what = "cleared" if watched.grad is None else "changed"
        return MisuseError(
            f"The gradient of {name!r} was {what} between two micro-batches of one window, so the sum would no longer "
            "be the batch's gradient. Inside a window call neither zero_grad() nor clip_grad_norm_() nor backward(): "
            "pass clip_norm= and return all terms of the loss to accumulator.backward()."
        )


def _count_nonzero(gradient: Tensor | None) -> bool:
    if gradient is None:
        return False
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(values.any())
