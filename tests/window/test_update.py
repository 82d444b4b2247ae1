"""From the summed gradient to the update: every path gives the same parameters, a skipped update leaves no trace."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradaccum as ga
from gradaccum.window.options import Options
from gradaccum.window.update import Updater

UPDATES = 4
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}  # a few roundings
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params, **fused: SGD(params, lr=0.1, **fused),
    "SGD with momentum": lambda params, **fused: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, **fused),
    "Adam": lambda params, **fused: Adam(params, lr=0.1, **fused),
    "AdamW": lambda params, **fused: AdamW(params, lr=0.1, amsgrad=True, **fused),
    "Adagrad": lambda params, **fused: Adagrad(params, lr=0.1, **fused),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
fused_or_not = pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
scaled_or_not = pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (3,), (), (0, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def give(params: list[nn.Parameter], found: list[Tensor], scale: float = 1.0) -> None:
    for parameter, gradient in zip(params, found, strict=True):
        parameter.grad = gradient.clone() * scale


def scale_of(updater: Updater) -> float:
    """What the seeds of the window are multiplied by; asked for before each window, as an accumulation does."""
    return 1.0 if updater.loss_scale is None else float(updater.loss_scale.scale(torch.ones(())))


def scaler(is_wanted: bool = True) -> Any:
    return GradScaler("cpu", init_scale=1024.0, growth_interval=2) if is_wanted else None


def trained(
    make: Callable[..., Optimizer], dtype: torch.dtype, *, clip_norm: float | None = None, scaled: bool = False,
    correction: float | Tensor | None = None, **fused: Any,
) -> list[Tensor]:  # fmt: skip
    params = parameters(dtype)
    updater = Updater([make(params, **fused)], clip_norm=clip_norm, scaler=scaler(scaled))
    factor = 1.0 if correction is None else float(correction)
    for i in range(UPDATES):
        give(params, gradients(params, i), scale_of(updater) / factor)
        applied = updater.apply(params, correction)
        assert applied.skipped is False
        assert (applied.grad_norm is None) == (clip_norm is None)
    return [parameter.detach() for parameter in params]


def one_update(updater: Updater, params: list[nn.Parameter], bad: float | None = None, correction: Any = None) -> Any:
    """From the first gradient, one element of which is not finite where there is a ``bad`` one."""
    give(params, gradients(params, 0), scale_of(updater))
    if bad is not None:
        params[0].grad.view(-1)[0] = bad  # type: ignore[union-attr]
    return updater.apply(params, correction)


def by_hand(make: Callable[..., Optimizer], dtype: torch.dtype, clip_norm: float | None) -> list[Tensor]:
    params = parameters(dtype)
    optimizer = make(params)
    for i in range(UPDATES):
        give(params, gradients(params, i))
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(params, clip_norm)
        optimizer.step()
    return [parameter.detach() for parameter in params]


# ---------------------------------------------------------------------------------------------------- all paths are one
@optimizers
@fused_or_not
@scaled_or_not
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_path_is_the_loop_written_by_hand(
    make: Callable[..., Optimizer], fused: bool, scaled: bool, dtype: torch.dtype
) -> None:
    corrections = [None, 7 / 3, torch.tensor(0.3, dtype=torch.float64)]
    for clip_norm, correction in itertools.product([None, 1.0, 1e9], corrections):
        found = trained(make, dtype, clip_norm=clip_norm, scaled=scaled, correction=correction, fused=fused)
        expected = by_hand(make, dtype, clip_norm)
        # Adam divides by the gradient's own size, so a rounding of it is one of the parameter too.
        torch.testing.assert_close(found, expected, rtol=0, atol=10 * TOLERANCE[dtype])


@fused_or_not
def test_optimizers_of_two_kinds(fused: bool) -> None:
    """One of them cannot skip by itself, so both wait for the check."""
    params = parameters()
    updater = Updater([SGD(params[:2], lr=0.1, fused=fused), Adam(params[2:], lr=0.1)])
    before = params[0].detach().clone()
    assert one_update(updater, params).skipped is False
    torch.testing.assert_close(params[0].detach(), before - 0.1 * gradients(params, 0)[0])


# ------------------------------------------------------------------------------------------------------------- the norm
def norm_of(found: list[Tensor], correction: float | None = None, clip_norm: float = 1e30) -> Tensor:
    params = [nn.Parameter(torch.zeros_like(gradient.to_dense())) for gradient in found]
    for parameter, gradient in zip(params, found, strict=True):
        parameter.grad = gradient
    applied = Updater([SGD(params)], clip_norm=clip_norm).apply(params, correction)
    assert applied.grad_norm is not None
    return applied.grad_norm


def test_the_norm_is_over_all_gradients_of_all_dtypes() -> None:
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    found = [torch.full((2,), 3.0, dtype=dtype) for dtype in dtypes]
    norm = norm_of(found)
    assert norm.item() == pytest.approx(math.sqrt(8 * 9), rel=1e-7), "each in its own precision, fp32 at least"
    assert (norm.dtype, norm.dim()) == (torch.float64, 0)
    assert norm_of(found[:2]).dtype == torch.float32
    # 100 values of 60,000: their squares are far beyond fp16, and so is their norm.
    assert norm_of([torch.full((100,), 6e4, dtype=torch.float16)]).item() == pytest.approx(6e5, rel=1e-3)


def test_empty_gradients_count_for_nothing() -> None:
    assert norm_of([torch.zeros(0, 3), torch.tensor([3.0, 4.0]), torch.zeros(0)]) == 5
    assert norm_of([torch.zeros(0)]) == 0
    params = [nn.Parameter(torch.zeros(0))]
    give(params, [torch.zeros(0)])
    assert Updater([SGD(params)]).apply(params, 0.5).skipped is False


def test_sparse_gradients() -> None:
    sparse = torch.sparse_coo_tensor([[1, 3]], [[3.0, 0.0], [0.0, 4.0]], (5, 2), check_invariants=True).coalesce()
    assert norm_of([sparse.clone()]) == 5
    parameter = nn.Parameter(torch.zeros(5, 2))
    parameter.grad = sparse.clone()
    applied = Updater([SGD([parameter], lr=1.0)], clip_norm=1.0).apply([parameter], 2.0)
    assert applied.grad_norm == 10
    torch.testing.assert_close(parameter.detach(), -sparse.to_dense() / 5)


def test_the_norm_is_of_the_corrected_gradient_before_clipping() -> None:
    assert norm_of([torch.tensor([3.0, 4.0])], correction=10, clip_norm=1.0).item() == pytest.approx(50)
    assert norm_of([torch.tensor([0.0])], clip_norm=1.0) == 0


@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e3, float("inf")])
@fused_or_not
def test_clipping_is_torchs_own(clip_norm: float, fused: bool) -> None:
    params, other = parameters(torch.float64), parameters(torch.float64)
    for parameter in params:
        parameter.data.zero_()
    updater = Updater([SGD(params, lr=1.0, fused=fused)], clip_norm=clip_norm)
    give(params, gradients(params, 3))
    give(other, gradients(other, 3))

    applied = updater.apply(params, None)
    norm = nn.utils.clip_grad_norm_(other, clip_norm)

    torch.testing.assert_close(applied.grad_norm, norm)
    torch.testing.assert_close([p.detach() for p in params], [-p.grad for p in other], rtol=1e-14, atol=1e-14)  # type: ignore[operator]


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan")])
def test_a_clip_norm_that_is_none(clip_norm: float) -> None:
    with pytest.raises(
        ga.WindowError, match=rf"clip_norm={clip_norm}: clipping to it would erase or reverse.*float\(\"inf\"\)"
    ):
        Options(clip_norm=clip_norm)


# ----------------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("where", ["few elements", "many elements", "another dtype", "complex", "sparse"])
def test_the_finite_check_sees_gradients_of_every_kind(where: str, bad: float, default: torch.dtype) -> None:
    found = {
        "few elements": torch.ones(5),
        "many elements": torch.ones(100_000),
        "another dtype": torch.ones(3, dtype=torch.float64),
        "complex": torch.ones(3, dtype=torch.complex64),
        "sparse": torch.ones(3).to_sparse(),
    }
    values = found[where]._values() if found[where].is_sparse else found[where]
    values[-1] = bad
    params = [nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)) for gradient in found.values()]
    for parameter, gradient in zip(params, found.values(), strict=True):
        parameter.grad = gradient
    torch.set_default_dtype(default)
    assert Updater([SGD(params, lr=0.1)]).apply(params, None).skipped is not math.isfinite(bad)


@optimizers
@fused_or_not
@scaled_or_not
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("updates_before", [0, 2])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_skipped_update_leaves_no_trace(
    make: Callable[..., Optimizer], fused: bool, scaled: bool, bad: float, updates_before: int, clip_norm: float | None
) -> None:
    params = parameters()
    optimizer = make(params, fused=fused)
    updater = Updater([optimizer], clip_norm=clip_norm, scaler=scaler(scaled))
    for i in range(updates_before):
        give(params, gradients(params, i), scale_of(updater))
        updater.apply(params, None)
    values = [parameter.detach().clone() for parameter in params]
    state = copy.deepcopy({key: dict(value) for key, value in optimizer.state_dict()["state"].items() if value})

    for element in (0, 11):  # the first and the last of the first gradient
        give(params, gradients(params, 9), scale_of(updater))
        params[0].grad.view(-1)[element] = bad  # type: ignore[union-attr]
        assert updater.apply(params, 0.5).skipped is True

    torch.testing.assert_close([p.detach() for p in params], values, rtol=0, atol=0)
    for key, value in optimizer.state_dict()["state"].items():
        if key in state:
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
        else:  # a fused optimizer begins its state in the step that it skips
            assert all(torch.count_nonzero(tensor) == 0 for tensor in value.values())

    give(params, gradients(params, 5), scale_of(updater))
    assert updater.apply(params, None).skipped is False, "and the next one is made"
    assert all(parameter.isfinite().all() for parameter in params)


@fused_or_not
@scaled_or_not
@pytest.mark.parametrize("bad_is_first", [True, False])
def test_several_optimizers_are_all_stepped_or_none(fused: bool, scaled: bool, bad_is_first: bool) -> None:
    params = parameters()
    both = [SGD(params[:1], lr=0.1, fused=fused), Adam(params[1:], lr=0.1, fused=fused)]
    updater = Updater(both if bad_is_first else both[::-1], scaler=scaler(scaled))
    values = [parameter.detach().clone() for parameter in params]
    assert one_update(updater, params, float("nan")).skipped is True
    torch.testing.assert_close([p.detach() for p in params], values, rtol=0, atol=0)
    assert one_update(updater, params).skipped is False
    assert not torch.equal(params[0], values[0])
    assert not torch.equal(params[1], values[1])


@scaled_or_not
def test_an_optimizer_without_gradients(scaled: bool) -> None:
    params = parameters()
    updater = Updater([SGD(params[:1], lr=0.1), SGD(params[1:2], lr=0.1)], scaler=scaler(scaled))
    give(params[:1], gradients(params, 0)[:1], scale_of(updater))
    before = params[0].detach().clone()
    assert updater.apply(params[:1], None).skipped is False
    torch.testing.assert_close(params[0].detach(), before - 0.1 * gradients(params, 0)[0])


@fused_or_not
def test_the_scale_shrinks_and_grows_as_torchs_own(fused: bool) -> None:
    params, ours = parameters(), scaler()
    updater = Updater([SGD(params, lr=0.1, fused=fused)], clip_norm=1.0, scaler=ours)
    scales = []
    for bad in (float("inf"), None, None, None):
        one_update(updater, params, bad, 3.0)
        scales.append(ours.get_scale())
    assert scales == [512, 512, 1024, 1024]


# ---------------------------------------------------------------------------------------------- loaded, mixed and plain
@pytest.mark.parametrize("fused", [False, True])
def test_only_fused_optimizers_find_out_for_themselves(fused: bool) -> None:
    """On a device that saves a wait for the gradient before each step."""
    params = parameters()
    optimizer = Adam(params, fused=fused)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda one, args, kwargs: seen.append(getattr(one, "found_inf", None)))
    assert one_update(Updater([optimizer]), params).skipped is False
    assert [None if found_inf is None else found_inf.item() for found_inf in seen] == [0.0 if fused else None]


@pytest.mark.parametrize("loaded", [True, False], ids=["of a state", "of its own"])
def test_groups_that_are_not_fused(loaded: bool) -> None:
    """Torch refuses what a fused optimizer is handed, and a state brings the groups of the optimizer it is of."""
    params = parameters()
    optimizer = Adam([{"params": params[:1]}, {"params": params[1:], "fused": loaded}], fused=True)
    updater = Updater([optimizer])
    if loaded:
        others = parameters()
        optimizer.load_state_dict(Adam([{"params": others[:1]}, {"params": others[1:]}]).state_dict())
    assert one_update(updater, params, correction=2.0).skipped is False


# ------------------------------------------------------------------------------------------------------ nothing is left
@fused_or_not
@scaled_or_not
def test_the_optimizer_is_left_as_it_was(fused: bool, scaled: bool) -> None:
    params, ours = parameters(), scaler()
    optimizer = Adam(params, lr=0.1, fused=fused)
    updater = Updater([optimizer], scaler=ours if scaled else None)
    scale_of(updater)  # makes the scaler's own tensor
    attributes, scale = set(vars(optimizer)), ours._scale
    one_update(updater, params, correction=0.5)
    assert set(vars(optimizer)) == attributes
    assert not optimizer._optimizer_step_post_hooks
    assert ours._scale is scale
    assert not updater.is_stepping


@fused_or_not
@scaled_or_not
@pytest.mark.parametrize("clip_norm", [None, 1e9])
def test_after_a_step_that_failed_the_next_one_is_right(fused: bool, scaled: bool, clip_norm: float | None) -> None:
    """Out of memory, say, when the first step allocates the state."""
    params = parameters()
    optimizer = SGD(params, lr=0.1, fused=fused)
    updater = Updater([optimizer], clip_norm=clip_norm, scaler=scaler(scaled))
    before = params[0].detach().clone()

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        one_update(updater, params)
    handle.remove()
    assert not updater.is_stepping
    assert one_update(updater, params).skipped is False
    torch.testing.assert_close(params[0].detach(), before - 0.1 * gradients(params, 0)[0])


# ----------------------------------------------------------------------------------------------------------- schedulers
def test_the_scheduler_is_advanced_by_the_library_itself() -> None:
    """While it is, calls by hand are allowed: that is how they are told apart."""
    params, seen = parameters(), []

    class Scheduler:
        def step(self) -> None:
            seen.append(updater.is_stepping)

    updater = Updater([SGD(params)], schedulers=[Scheduler()])
    one_update(updater, params)
    assert seen == [True]


def test_plateaus_are_refused() -> None:
    optimizer = SGD(parameters())
    with pytest.raises(ga.ParameterError, match=r"ReduceLROnPlateau is advanced .* scheduler.step\(metric\)"):
        Options(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))


# ---------------------------------------------------------------------------------------------- the gradient, no update
@scaled_or_not
@pytest.mark.parametrize("correction", [None, 0.5, torch.tensor(0.5)], ids=repr)
def test_unscaled_into_grad(scaled: bool, correction: float | Tensor | None) -> None:
    params = parameters()
    updater = Updater([SGD(params)], scaler=scaler(scaled))
    give(params, gradients(params, 0), scale_of(updater))
    updater.into_grad(params, correction)
    expected = [gradient * (1.0 if correction is None else 0.5) for gradient in gradients(params, 0)]
    torch.testing.assert_close([parameter.grad for parameter in params], expected)


def test_a_disabled_scaler_is_none() -> None:
    assert Updater([SGD(parameters())], scaler=GradScaler("cpu", enabled=False)).loss_scale is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_keep_their_dtype(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=dtype))
    give([parameter], [torch.full((4,), 2.0, dtype=dtype)])
    applied = Updater([SGD([parameter], lr=1.0)], clip_norm=1.0).apply([parameter], torch.tensor(3.0))
    assert applied.grad_norm == 12
    assert parameter.detach().tolist() == [-0.5] * 4


# -------------------------------------------------------------------------------------------------- before the step
@fused_or_not
@scaled_or_not
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("where", ["before_step", "pre-hook", "global pre-hook"])
def test_what_is_seen_before_a_step_is_the_gradient_itself(
    fused: bool, scaled: bool, clip_norm: float | None, where: str
) -> None:
    """And what is made of it is what the optimizer takes."""

    def trained(hook: Any, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
        params, found = parameters(), []

        def look(*_: Any) -> None:
            found.extend(parameter.grad.clone() for parameter in params)  # type: ignore[union-attr]
            nn.utils.clip_grad_value_(params, 1e-2)

        optimizer = AdamW(params, lr=0.1, eps=1e-2, fused=fused)
        handle = None
        if hook == "pre-hook":
            handle = optimizer.register_step_pre_hook(look)
        elif hook == "global pre-hook":
            handle = register_optimizer_step_pre_hook(look)
        else:
            options["before_step"] = look
        updater = Updater([optimizer], clip_norm=clip_norm, **options)
        give(params, gradients(params, 0), scale_of(updater) * 4)
        try:
            assert updater.apply(params, 0.25).skipped is False
        finally:
            if handle is not None:
                handle.remove()
        return found, [parameter.detach() for parameter in params]

    params = parameters(torch.float64)
    give(params, [gradient.double() for gradient in gradients(parameters(), 0)])
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(params, clip_norm)
    found, moved = trained(where, scaler=scaler(scaled))
    for seen, parameter in zip(found, params, strict=True):
        torch.testing.assert_close(seen.double(), parameter.grad, rtol=1e-6, atol=1e-7)
    nn.utils.clip_grad_value_(params, 1e-2)
    AdamW(params, lr=0.1, eps=1e-2).step()
    for mine, whole in zip(moved, params, strict=True):
        torch.testing.assert_close(mine.double(), whole.detach(), rtol=1e-5, atol=1e-6)


@fused_or_not
@scaled_or_not
def test_nothing_is_called_before_a_step_that_is_skipped(fused: bool, scaled: bool) -> None:
    params, calls = parameters(), []
    updater = Updater([Adam(params, fused=fused)], scaler=scaler(scaled), before_step=lambda: calls.append(1))
    assert one_update(updater, params, bad=math.inf).skipped
    assert calls == []
    assert one_update(updater, params).skipped is False
    assert calls == [1]


def test_before_step_once_an_update_of_several_optimizers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    calls: list[Tensor] = []
    optimizers = [SGD(part.parameters(), lr=0.1) for part in model]
    data = torch.randn(10, 3, dtype=torch.float64)
    accumulator = ga.Accumulator(
        model, optimizers, micro_batches=2, before_step=lambda: calls.append(model[0].weight.grad.clone())
    )
    whole = [torch.autograd.grad(model(data[:6]).square().mean(), model[0].weight)[0]]
    for x in accumulator.over(data.split(3)):
        accumulator.backward(model(x).square().mean())
        if accumulator.updates == 1 and len(whole) == 1:
            whole.append(torch.autograd.grad(model(data[6:]).square().mean(), model[0].weight)[0])
    assert len(calls) == 2
    for seen, wanted in zip(calls, whole, strict=True):
        torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-12)


def test_before_step_is_a_function() -> None:
    with pytest.raises(ga.ParameterError, match="called once an update, without arguments"):
        Options(before_step=1.0)  # type: ignore[arg-type]


def test_a_norm_that_is_only_measured_writes_no_gradient() -> None:
    model = nn.Linear(5, 3)
    model(torch.ones(2, 5)).sum().backward()
    parameters = list(model.parameters())
    before = [parameter.grad._version for parameter in parameters if parameter.grad is not None]
    applied = Updater([torch.optim.SGD(parameters, lr=0.1)], clip_norm=math.inf).apply(parameters, None)
    assert applied.grad_norm is not None
    assert [parameter.grad._version for parameter in parameters if parameter.grad is not None] == before
