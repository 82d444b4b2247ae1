"""Weight gradients added up in place are torch's own, and what cannot be shown to be right is left to torch.

Each case has a model, a loss, and the weights that are to be added up in place. Two backwards on different data are
added up, by torch and by the library, in float64.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import casting
from gradaccum.errors import MisuseError
from gradaccum.gradients.fused.backward import FusedBackward
from gradaccum.gradients.fused.choice import choice_of
from gradaccum.gradients.gradient_sum import GradientSum
from gradaccum.gradients.graph import read_graph
from oracle import EXACT, assert_same_gradients, gradients_of

WIDTH, ROWS, WORDS = 5, 7, 11
ADJACENCY = torch.tensor([[float((i * j) % 3 == 0) for j in range(WIDTH)] for i in range(ROWS)]).double().to_sparse()

Forward = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """``forward(model, x)`` gives anything; ``x`` is (ROWS, WIDTH), or (ROWS, 3) of words for ``reads="words"``."""

    make: Callable[[], nn.Module]
    forward: Forward = lambda model, x: model(x)
    in_place: frozenset[str]
    reads: str = "numbers"

    def data(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.reads == "words":
            return torch.randint(WORDS, (ROWS, 3), generator=generator)
        return torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)


def layers(*, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))


class Matrix(nn.Module):
    """Parameters ``w`` (WIDTH, 4) and ``b`` (4)."""

    def __init__(self, *shape: int, transposed: bool = False) -> None:
        super().__init__()
        shape = shape or (WIDTH, 4)
        values = torch.randn(*reversed(shape)).t() if transposed else torch.randn(*shape)
        self.w = nn.Parameter(values)
        self.b = nn.Parameter(torch.randn(shape[-1]))


class Tied(nn.Module):
    """A language model in which the table is also the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.table(words))))


def twice() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), layer)


def experts(model: Any, x: Tensor) -> Tensor:
    hidden = torch.tanh(torch.bmm(x.unsqueeze(0).repeat(2, 1, 1), model[0]))
    return torch.bmm(hidden, model[1].transpose(-1, 1))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False)


def adjacent(matrix: Callable[[], Tensor]) -> Forward:
    return lambda m, x: checkpoint(lambda x: (matrix() @ m.w) * x[:, :4], x, use_reentrant=False)


def nested(model: Any, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(lambda x: model[1](model[0](x)), x, use_reentrant=False)

    return checkpoint(lambda x: model[2](inner(x)), x, use_reentrant=False)


def not_stopped_early(model: nn.Module, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpointed(model, x)


def hooked_output(model: Any, x: Tensor) -> Tensor:
    hidden = model[0](x)
    hidden.register_hook(lambda gradient: 3 * gradient)
    hidden.retain_grad()
    return model[2](hidden)


def hooked_modules() -> nn.Module:
    model = layers()
    for module in model:
        module.register_full_backward_hook(lambda _, before, __: None if before[0] is None else (2 * before[0],))
    return model


def over_samples(model: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())
    return torch.func.vmap(lambda one: torch.func.functional_call(model, parameters, (one,)))(x)


def patched() -> nn.Module:
    """Somebody else's layer in place of torch's, calling what it replaces."""
    model: Any = layers()
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    return model


BOTH = frozenset({"0.weight", "2.weight"})
W = frozenset({"w"})
ATTENTION = frozenset({"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"})
NONE: frozenset[str] = frozenset()


def on_layers(forward: Forward, in_place: frozenset[str] = BOTH) -> Case:
    return Case(make=layers, forward=forward, in_place=in_place)


def on_matrix(forward: Forward, in_place: frozenset[str] = W, make: Callable[[], nn.Module] = Matrix) -> Case:
    return Case(make=make, forward=forward, in_place=in_place)


def on_list(forward: Forward, *shapes: tuple[int, ...]) -> Case:
    in_place = frozenset(map(str, range(len(shapes))))
    return Case(make=lambda: nn.ParameterList(map(torch.randn, shapes)), forward=forward, in_place=in_place)


def on_words(make: Callable[[], nn.Module], *in_place: str, forward: Forward = Case.forward) -> Case:
    return Case(make=make, forward=forward, reads="words", in_place=frozenset(in_place))


IN_PLACE: dict[str, Case] = {
    "linear": Case(make=layers, in_place=BOTH),
    "no bias, so that the first is on the way to nothing": Case(make=lambda: layers(bias=False), in_place=BOTH),
    "one sample without a batch": on_layers(lambda m, x: m(x[0])),
    "three dimensions": on_layers(lambda m, x: m(x.expand(2, ROWS, WIDTH))),
    "four dimensions": on_layers(lambda m, x: m(x.expand(2, 3, ROWS, WIDTH) + 1)),
    "no rows": on_layers(lambda m, x: m(x[:0])),
    "strided input": on_layers(lambda m, x: m(x.repeat(1, 2)[:, ::2])),
    "transposed input": on_layers(lambda m, x: m(x.t().contiguous().t())),
    "strided gradient": on_layers(lambda m, x: m(x).t()[::2]),
    "input that requires a gradient": on_layers(lambda m, x: m(x.requires_grad_())),
    "frozen bias": Case(make=lambda: frozen(layers(), "0.bias", "2.bias"), in_place=BOTH),
    "frozen weight before": Case(make=lambda: frozen(layers(), "0.weight"), in_place=frozenset({"2.weight"})),
    "frozen weight after": Case(make=lambda: frozen(layers(), "2.weight"), in_place=frozenset({"0.weight"})),
    "functional linear": on_matrix(lambda m, x: F.linear(x, m.w), make=lambda: Matrix(4, WIDTH)),
    "x W": on_matrix(lambda m, x: x @ m.w),
    "W x": on_matrix(lambda m, x: m.w @ x.t(), make=lambda: Matrix(4, WIDTH)),
    "W.T x": on_matrix(lambda m, x: m.w.T @ x.t()),
    "x W.mT": on_matrix(lambda m, x: x @ m.w.mT, make=lambda: Matrix(4, WIDTH)),
    "x transposed twice": on_matrix(lambda m, x: x @ m.w.transpose(-1, 0).permute(-1, -2)),
    "addmm, as HF's Conv1D": on_matrix(lambda m, x: torch.addmm(m.b, x, m.w)),
    "addmm with factors": on_matrix(lambda m, x: torch.addmm(m.b, x, m.w, alpha=0.3, beta=2)),
    "parameter with strides": on_matrix(lambda m, x: torch.tanh(x @ m.w), make=lambda: Matrix(transposed=True)),
    "both factors are weights": on_list(lambda m, x: x @ (m[0] @ m[1]), (WIDTH, 3), (3, 2)),
    "a matrix times itself": on_matrix(lambda m, x: x @ (m.w @ m.w), make=lambda: Matrix(WIDTH, WIDTH)),
    "cast": on_matrix(lambda m, x: x.float() @ m.w.float()),
    "experts": on_list(experts, (2, WIDTH, 3), (2, WIDTH, 3)),
    "used twice": Case(make=twice, in_place=frozenset({"0.weight"})),
    "embedding": on_words(lambda: nn.Embedding(WORDS, 4), "weight"),
    "embedding with padding": on_words(lambda: nn.Embedding(WORDS, 4, padding_idx=2), "weight"),
    "embedding with padding counted from the end": on_words(lambda: nn.Embedding(WORDS, 4, padding_idx=-1), "weight"),
    "tied": on_words(Tied, "table.weight", "body.weight"),
    "attention": Case(
        make=lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        forward=lambda m, x: m(x[None, :, :4]),
        in_place=ATTENTION,
    ),
    "recurrent, with one use for each step": on_matrix(
        lambda m, x: m(x)[0], frozenset({"weight_ih_l0", "weight_hh_l0"}), lambda: nn.LSTM(WIDTH, 3)
    ),
    "over samples by vmap": on_layers(over_samples),
    "checkpoint": on_layers(checkpointed),
    "checkpoint, input with gradient": on_layers(lambda m, x: checkpointed(m, x.requires_grad_())),
    "checkpoint of a checkpoint": on_layers(nested),
    "sparse adjacency under a checkpoint": on_matrix(adjacent(lambda: ADJACENCY)),
    "compressed sparse adjacency under a checkpoint": on_matrix(adjacent(ADJACENCY.to_sparse_csr)),
    "checkpoint without early stop": on_layers(not_stopped_early),
    "checkpointed embedding": on_words(Tied, "table.weight", "body.weight", forward=checkpointed),
    "hooks on outputs": on_layers(hooked_output),
    "hooks on modules": Case(make=hooked_modules, forward=lambda m, x: m(x.requires_grad_()), in_place=BOTH),
    "patched forward": Case(make=patched, in_place=BOTH),
}


class Doubled(torch.autograd.Function):
    """Multiplies by twice a weight, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        return 2 * gradients[0] @ weight.t(), 2 * x.t() @ gradients[0]


class Kind(nn.Parameter):
    """A parameter of another class than torch's."""


def of_a_kind() -> nn.Module:
    model = Matrix()
    model.w = Kind(model.w)
    return model


def hooked() -> nn.Module:
    model = layers()
    model[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return model


def hooked_before_the_leaf() -> nn.Module:
    model: Any = layers().double()  # of another dtype it would have another node
    model.node = node_of(model[0].weight)  # else the graph's end, and the hook with it
    model.node.register_prehook(lambda gradients: (2 * gradients[0],))
    return model


def hooked_after_the_product() -> nn.Module:
    model: Any = layers()
    model[0].register_backward_hook(lambda _, before, __: tuple(None if one is None else 2 * one for one in before))
    return model


def hooked_transposition(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    *_, (transposed, _) = out.grad_fn.next_functions
    transposed.register_hook(lambda before, _: (3 * before[0],))
    return out


def penalised(model: Any, x: Tensor, *, of_weight: bool = False) -> Tensor:
    """A gradient penalty: the loss contains a gradient."""
    x = x.clone().requires_grad_()
    out = model(x)
    value, variable = (out.square(), model[0].weight) if of_weight else (out, x)
    (gradient,) = torch.autograd.grad(value.sum(), variable, create_graph=True)
    return torch.cat([out.flatten(), gradient.flatten()])


def offloaded(model: nn.Module, x: Tensor) -> Tensor:
    """Saved tensors by hooks that give each out once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> int:
        kept[len(kept)] = tensor.clone()
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(keep, kept.pop):
        return model(x)


ASIDE: dict[str, Case] = {
    "parametrised": Case(
        make=lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, 4)), nn.Linear(4, 2)),
        in_place=frozenset({"1.weight"}),
    ),
    "orthogonal": Case(make=lambda: parametrizations.orthogonal(nn.Linear(WIDTH, 4)), in_place=NONE),
    "masked": on_matrix(lambda m, x: x @ (m.w * (m.w > 0)), NONE),
    "hook on the weight": Case(make=hooked, in_place=frozenset({"2.weight"})),
    "hook before the leaf's node": Case(make=hooked_before_the_leaf, in_place=frozenset({"2.weight"})),
    "hook after the product": Case(make=hooked_after_the_product, in_place=frozenset({"2.weight"})),
    "hook on the transposition": on_layers(hooked_transposition, frozenset({"0.weight"})),
    "parameter of another class": on_matrix(lambda m, x: x @ m.w, NONE, of_a_kind),
    "gradient penalty": on_layers(penalised),
    "gradient of a weight in the loss": on_layers(lambda m, x: penalised(m, x, of_weight=True)),
    "function of its own": on_matrix(lambda m, x: Doubled.apply(x, m.w), NONE),
    "weight decay in the loss": on_matrix(lambda m, x: torch.cat([(x @ m.w).flatten(), m.w.flatten()]), NONE),
    "part of a weight": on_matrix(lambda m, x: x @ m.w[:, 1:], NONE),
    "weight with its dimensions turned": on_matrix(
        lambda m, x: torch.bmm(x.expand(2, ROWS, WIDTH), m.w.permute(0, 2, 1).mT), make=lambda: Matrix(2, WIDTH, 3)
    ),
    "batch dimension turned": on_matrix(
        lambda m, x: torch.bmm(x.expand(2, ROWS, WIDTH), m.w.transpose(0, 1)), NONE, lambda: Matrix(WIDTH, 2, 3)
    ),
    "matrix as the summand": on_matrix(
        lambda m, x: torch.addmm(m.w, x, x.t() @ m.w.detach()), NONE, lambda: Matrix(ROWS, 4)
    ),
    "vector": on_matrix(lambda m, x: torch.mv(x, m.w[:, 0]) + m.b.sum(), NONE),
    "einsum": on_matrix(lambda m, x: torch.einsum("ri,io->ro", x, m.w), NONE),
    "complex": Case(
        make=lambda: nn.ParameterList([torch.randn(WIDTH, 3, dtype=torch.complex64)]),
        forward=lambda m, x: torch.view_as_real(x.to(m[0].dtype) @ m[0]),
        in_place=NONE,
    ),
    "sparse embedding": on_words(lambda: nn.Embedding(WORDS, 4, sparse=True)),
    "embedding scaled by frequency": on_words(lambda: nn.Embedding(WORDS, 4, scale_grad_by_freq=True)),
    "bag of embeddings": on_words(lambda: nn.EmbeddingBag(WORDS, 4)),
    "sparse input": on_matrix(lambda m, x: torch.sparse.mm(x.to_sparse(), m.w), NONE),
    "convolution": on_matrix(lambda m, x: m(x[:, None]), NONE, lambda: nn.Conv1d(1, 3, 2, stride=2, padding=1)),
    "saved tensors given out once": on_layers(offloaded, NONE),
    "reentrant checkpoint": on_layers(
        lambda m, x: m[2](checkpoint(m[:2], x.requires_grad_(), use_reentrant=True)), NONE
    ),
    "compiled": on_layers(lambda m, x: torch.compile(m, backend="aot_eager")(x), NONE),
    "compiled in full": on_layers(lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True)(x), NONE),
}


@pytest.mark.filterwarnings(
    "ignore:Sparse:UserWarning", "ignore:.*:DeprecationWarning", "ignore:Using a non-full:FutureWarning"
)
@pytest.mark.parametrize("name", [*IN_PLACE, *ASIDE])
def test_the_gradient_is_torchs(name: str) -> None:
    case = (IN_PLACE | ASIDE)[name]
    model = case.make()
    if not any(parameter.is_complex() for parameter in model.parameters()):
        model = model.double()
    state = copy.deepcopy(model.state_dict())
    for seed in (1, 2):
        case.forward(model, case.data(seed)).pow(2).sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    gradients = GradientSum(model.named_parameters(), fused=True)
    gradients.begin()
    for seed in (1, 2):
        loss = case.forward(model, case.data(seed)).pow(2).sum()
        assert in_place(model, loss) == case.in_place
        gradients.add((loss,), (torch.ones_like(loss),))
    tolerance = 1e-5 if name in ("cast", "complex") else EXACT  # both compute in fp32
    assert_same_gradients(gradients_of(model), expected, tolerance=tolerance)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def fused_backward(model: nn.Module) -> FusedBackward:
    choice = choice_of(True)
    assert choice is not None
    return FusedBackward(model.parameters(), choice)


def in_place(model: nn.Module, loss: Tensor) -> frozenset[str]:
    plan = fused_backward(model).plan((loss,), None, read_graph((loss,)))
    chosen = {} if plan is None else plan.in_place
    return frozenset(name for name, parameter in model.named_parameters() if parameter in chosen)


def run(model: nn.Module, loss: Tensor) -> None:
    assert fused_backward(model).run((loss,), (torch.ones_like(loss),), None, read_graph((loss,)))


# --------------------------------------------------------------------------------------------------- what must still be
def test_hooks_fire_once_a_backward_when_the_gradient_is_complete() -> None:
    model = Tied().double()
    seen: list[Tensor] = []
    weight = model.table.weight
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    words = torch.tensor([[1, 2, 2]])
    model(words).pow(2).sum().backward()
    expected = seen.pop()
    model.zero_grad()
    run(model, model(words).pow(2).sum())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)


def node_of(parameter: Tensor) -> Any:
    """The leaf's ``AccumulateGrad``."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def test_a_hook_on_the_leafs_node_sees_the_gradient() -> None:
    model: Any = layers()
    seen: list[Tensor] = []
    node = node_of(model[0].weight)
    node.register_hook(lambda _, gradients: seen.append(gradients[0]))
    gradients = GradientSum(model.named_parameters(), fused=True)
    gradients.begin()
    gradients.add((model(torch.randn(ROWS, WIDTH)).square().sum(),), (torch.ones(()),))
    assert torch.equal(seen[0], model[0].weight.grad)


class With(torch.autograd.Function):
    """A copy with another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: Callable[[], Any]) -> Tensor:
        ctx.run = backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.run(), None


def test_a_weight_without_any_gradient_from_a_use() -> None:
    model = layers()
    loss = model[2](torch.ones(1, 6)).sum() + With.apply(model[0](torch.ones(1, WIDTH)), lambda: None).sum()
    run(model, loss)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_gradients_of_other_models_are_left_alone() -> None:
    generator, discriminator = nn.Linear(WIDTH, 4).double(), nn.Linear(4, 1).double()
    gradients = GradientSum(generator.named_parameters(), fused=True)
    loss = discriminator(generator(torch.randn(ROWS, WIDTH, dtype=torch.float64))).sum()
    loss.backward(retain_graph=True)
    expected = gradients_of(generator)
    generator.zero_grad()
    discriminator.zero_grad()
    gradients.add((loss,), (torch.ones_like(loss),))
    assert_same_gradients(gradients_of(generator), expected)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_several_roots_one_of_them_a_parameter() -> None:
    model = nn.Linear(WIDTH, 2).double()
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    model.register_parameter("scale", scale)
    out = model(torch.randn(ROWS, WIDTH, dtype=torch.float64))
    roots = (out.pow(2).sum(), out.sum(), scale)
    (roots[0] - roots[1] + 3 * scale).backward(retain_graph=True)
    expected = gradients_of(model)
    model.zero_grad()
    seed = torch.ones((), dtype=torch.float64)
    assert fused_backward(model).run(roots, (seed, -seed, 3 * seed), None, read_graph(roots))
    assert_same_gradients(gradients_of(model), expected)


def test_a_backward_that_fails_leaves_no_hook_behind() -> None:
    def breaks() -> None:
        raise MisuseError("broken")

    model = layers().double()
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    hidden = model[0](x)
    with pytest.raises(MisuseError, match="broken"):
        run(model, model[2](With.apply(hidden, breaks)).sum())
    model.zero_grad()
    hidden.sum().backward()  # hidden's own node still has its graph, and must not add up twice
    torch.testing.assert_close(model[0].weight.grad, x.sum(0).expand(6, WIDTH))


def test_a_graph_that_is_gone_is_torchs_error() -> None:
    model = layers()
    loss = model(torch.randn(ROWS, WIDTH)).sum()
    loss.backward()
    model.zero_grad()
    gradients = GradientSum(model.named_parameters(), fused=True)
    with pytest.raises(RuntimeError, match="second time"):
        gradients.add((loss,), (torch.ones(()),))


def test_a_gradient_that_cannot_be_added_to_in_place_is_left_to_torch() -> None:
    model = nn.Embedding(WORDS, 4)
    model.weight.grad = torch.ones(WORDS, 4).to_sparse()
    assert in_place(model, model(torch.tensor([1])).sum()) == NONE


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside of autocast", "outside"])
def test_under_autocast_the_products_are_torchs_before_rounding(inside: bool) -> None:
    model = layers()
    x = torch.randn(ROWS, WIDTH)

    def backward(with_library: bool) -> dict[str, Tensor | None]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            run(model, loss) if with_library else loss.backward()
        return gradients_of(model)

    # Torch rounds each product to bf16 before it is added in fp32; here it is not rounded.
    assert_same_gradients(backward(True), backward(False), tolerance=2.0**-8)


def test_in_a_thread_of_the_engine_the_casts_are_left_alone() -> None:
    model = casting.make()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(ROWS, casting.FEATURES)).float().pow(2).sum()

        def backward() -> None:  # as the engine sets autocast in its threads: switched on, in no context
            torch.set_autocast_dtype("cpu", torch.bfloat16)
            torch.set_autocast_enabled("cpu", True)
            run(model, loss)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert model[0].weight.grad is not None
        assert not casting.is_cache_empty(model)


def test_inside_of_autocast_a_layer_that_is_not_cast_keeps_its_precision() -> None:
    model = nn.Linear(WIDTH, 4, bias=False)
    loss = model(torch.randn(ROWS, WIDTH)).pow(2).sum()
    loss.backward(retain_graph=True)
    expected = gradients_of(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        run(model, loss)
    assert_same_gradients(gradients_of(model), expected, tolerance=1e-6)
