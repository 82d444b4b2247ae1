"""One process is somewhere else than the others: one error on all that names both places, and none of it is used."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gradaccum as ga
from oracle import assert_same_gradients, parameters_of
from ranks import results_of, run_ranks
from wrapping import sgd

BOTH = "The processes are at different places: "


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def make() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def rows(rank: int, seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(97 * seed + rank))


def told(call: Any, *arguments: Any) -> str:
    """The message of the error between processes that a call ends in."""
    with pytest.raises(ga.RankError) as caught:
        call(*arguments)
    return str(caught.value)


def saves_alone(rank: int, folder: str) -> None:
    """``if rank == 0: checkpoint.save()``: told, and all go on together."""
    model = make()
    step = ga.TrainStep(model, optimizer := sgd(model), loss_fn, micro_batch_size=2)
    checkpoint = ga.Checkpoint(Path(folder) / "alone", model=model, optimizer=optimizer, train_step=step)
    step(rows(rank))
    before = parameters_of(model)
    said = told(checkpoint.save) if rank == 0 else told(step, rows(rank, 1))
    place = "rank 0 saves a checkpoint (at update 1), and rank 1 closes the window of update 2 of a TrainStep"
    assert said.startswith(BOTH + place), said
    assert "not inside of `if rank == 0`" in said
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert not list((Path(folder) / "alone").glob("*"))
    assert step(rows(rank, 2)).index == 2
    assert checkpoint.save().exists()


def looks_at_a_gradient_alone(rank: int) -> None:
    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2)
    step(rows(rank))
    before = parameters_of(model)
    said = told(step.backward, rows(rank, 1)) if rank == 0 else told(step, rows(rank, 1))
    assert "rank 0 closes the window of update 2 of train_step.backward" in said, said
    assert "rank 1 closes the window of update 2 of a TrainStep" in said
    assert_same_gradients(parameters_of(model), before, tolerance=0.0)
    assert all(parameter.grad is None for parameter in model.parameters())


def another_order_of_models(rank: int) -> None:
    """Two models of different shapes, of which one process trains the other one first."""
    models = make(), nn.Linear(3, 2).double()
    steps = [ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2) for model in models]
    for step in steps:
        step(rows(0))
    before = [parameters_of(model) for model in models]
    said = told(steps[rank], rows(rank))
    assert "of a TrainStep (model " in said
    assert "Every process must train the same models, in the same order" in said
    for model, parameters in zip(models, before, strict=True):
        assert_same_gradients(parameters_of(model), parameters, tolerance=0.0)


def leaves_its_pass_alone(rank: int) -> None:
    """A `break` on one process; a pass later all are in the same one again."""
    model = make()
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=2)

    def train(leaves_at: int | None) -> None:
        for i, x in enumerate(accumulator.over([rows(rank, 10 + k) for k in range(8)])):
            if accumulator.backward(loss_fn(model, x)) and i == leaves_at:
                break

    train(3)  # all of them leave: right

    def epochs() -> None:
        train(3 if rank == 1 else None)
        train(None)

    said = told(epochs)
    assert "rank 0 closes the window of update 5, in pass 2 over its loader" in said, said
    assert "rank 1 closes the window of update 5, in pass 3 over its loader" in said
    assert "has left its pass" in said
    train(None)  # all have heard of it, and are in the same pass again
    assert accumulator.updates == 8


def a_loader_fails(rank: int) -> None:
    """The others hear of it at once, and not of the transport."""
    model = make()
    accumulator = ga.Accumulator(model, sgd(model), micro_batches=2)

    def loader() -> Any:
        for k in range(6):
            if rank == 1 and k == 3:
                raise ValueError("record 3 is torn")
            yield rows(rank, k)

    def train(items: Any) -> None:
        for x in accumulator.over(items):
            accumulator.backward(loss_fn(model, x))

    with pytest.raises(ValueError if rank == 1 else ga.RankError, match="record 3 is torn"):
        train(loader())
    assert accumulator.updates == 1
    train([rows(rank, 7), rows(rank, 8)])
    assert accumulator.updates == 2


class Failing(torch.optim.SGD):
    """Fails in its first step, on one process."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError("no memory for the state")
        return super().step(closure)


class Scheduler(torch.optim.lr_scheduler.StepLR):
    fails = False

    def step(self, *args: Any) -> None:
        if self.fails:
            self.fails = False
            raise ValueError("no such rate")
        super().step(*args)


def a_step_fails(rank: int, folder: str) -> None:
    """The others hear of it in the same update, which they have made; nobody goes on with other parameters."""
    for what in ("optimizer", "scheduler", "own loop"):
        model = make()
        optimizer = Failing(model.parameters(), lr=0.1)
        scheduler = Scheduler(optimizer, 5)
        named = "accumulator" if what == "own loop" else "train_step"
        if rank == 1:
            (scheduler if what == "scheduler" else optimizer).fails = True
        step: Any
        if what == "own loop":
            step = ga.Accumulator(model, optimizer, micro_batches=2, scheduler=scheduler)

            def update(k: int, step: Any = step, model: Any = model) -> None:
                for x in step.over([rows(rank, 2 * k), rows(rank, 2 * k + 1)]):
                    step.backward(loss_fn(model, x))
        else:
            step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=2, scheduler=scheduler)

            def update(k: int, step: Any = step) -> None:
                step(rows(rank, k))

        objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, named: step}
        checkpoint = ga.Checkpoint(Path(folder) / what, **objects)
        checkpoint.save()
        if rank == 1:
            with pytest.raises((torch.OutOfMemoryError, ValueError)):
                update(0)
            # A scheduler fails after the step: the parameters have moved, and the counter says so.
            assert step.updates == (1 if what == "scheduler" else 0)
        else:
            said = told(update, 0)
            assert "rank 1: " in said
            assert "Update 1 has been made on this process, and failed on rank 1" in said
            assert "no update was made" not in said
            assert step.updates == 1
        # Their parameters or rates differ: none goes on, until a state of both has been loaded.
        before = parameters_of(model)
        for _ in range(2):
            said = told(update, 1)
            assert "Update 1 has been made on some processes and not on others" in said
            assert "rank 1: " in said
        assert "Update 1 has been made on some" in told(checkpoint.save)
        assert_same_gradients(parameters_of(model), before, tolerance=0.0)
        checkpoint.load()
        assert step.updates == 0
        update(2)
        assert step.updates == 1


def a_step_fails_everywhere(rank: int) -> None:
    """In the same way on all processes: none has stepped, and all can go on."""
    model = make()
    optimizer = Failing(model.parameters(), lr=0.1)
    optimizer.fails = True
    step = ga.TrainStep(model, optimizer, loss_fn, micro_batch_size=2)
    with pytest.raises(torch.OutOfMemoryError):
        step(rows(rank))
    assert step(rows(rank)).index == 1


def other_collectives_in_between(rank: int) -> None:
    """A process that is in a collective of the user's gets its own numbers, whatever the library says meanwhile."""
    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2)
    work: Any = None
    seen = [torch.zeros(11, dtype=torch.int64) for _ in range(2)]
    for k in range(3):
        if rank == k:  # begun on one process an update before the other; no gradients go the same way meanwhile
            work = dist.all_gather(seen, torch.full((11,), 100 + rank), async_op=True)
        step._accumulation.ranks.stepped()
    work.wait()
    assert [int(one[0]) for one in seen] == [100, 101]


def unequal_loaders_with_collectives(rank: int, folder: str) -> None:
    """`windows` runs its body equally often: own collectives and checkpoints at each update, and the right sums."""
    for counts in ([6, 2], [0, 3], [5, 4], [2, 2]):
        model = make()
        alone = copy.deepcopy(model)
        optimizer = sgd(model)
        accumulator = ga.Accumulator(model, optimizer, micro_batches=2)
        checkpoint = ga.Checkpoint(
            Path(folder) / f"windows {counts}", model=model, optimizer=optimizer, accumulator=accumulator
        )
        bodies = 0
        for window in accumulator.windows([rows(rank, k) for k in range(counts[rank])]):
            for x in window:
                accumulator.backward(loss_fn(model, x))
            bodies += 1
            assert window.update is not None
            assert window.update.index == bodies
            seen = [torch.zeros(11, dtype=torch.int64) for _ in range(2)]
            dist.all_gather(seen, torch.full((11,), 100 * bodies + rank))
            assert [int(one[0]) for one in seen] == [100 * bodies, 100 * bodies + 1]
            checkpoint.save()
        assert bodies == accumulator.updates == -(-max(counts) // 2)
        expected = sgd(alone)
        for at in range(0, max(counts), 2):
            whole = [rows(r, k) for r in (0, 1) for k in range(at, min(at + 2, counts[r]))]
            loss_fn(alone, torch.cat(whole)).backward()
            expected.step()
            expected.zero_grad()
        assert_same_gradients(parameters_of(model), parameters_of(alone))


def all_of_them(rank: int, world_size: int, folder: str) -> None:
    saves_alone(rank, folder)
    looks_at_a_gradient_alone(rank)
    another_order_of_models(rank)
    leaves_its_pass_alone(rank)
    a_loader_fails(rank)
    a_step_fails(rank, folder)
    a_step_fails_everywhere(rank)
    other_collectives_in_between(rank)
    unequal_loaders_with_collectives(rank, folder)


def test_one_is_somewhere_else(tmp_path: Path) -> None:
    results_of(all_of_them, 2, str(tmp_path))


def ends_early(rank: int, world_size: int, how: str) -> None:
    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2)
    for k in range(3):
        if rank == 1 and k == 2:
            if how == "raises":
                raise KeyError("no such column")
            dist.destroy_process_group()
            sys.exit(0)
        step(rows(rank, k))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "ends",
            "the script of rank 1 came to its end, and was not killed; the commonest cause is that processes have",
        ),
        ("raises", "the script of rank 1 was ended by KeyError: 'no such column'"),
    ],
)
def test_one_has_fewer_batches(how: str, said: str) -> None:
    ended = run_ranks(ends_early, 2, how)
    assert said in ended[0].stderr, ended[0].stderr[-2000:]
    assert "as a process that is killed" not in ended[0].stderr


def silent(rank: int, world_size: int) -> None:
    """With ``timeout=`` a process that does not answer is told of after that, and not after the group's own."""
    model = make()
    step = ga.TrainStep(model, sgd(model), loss_fn, micro_batch_size=2, timeout=3)
    step(rows(rank))
    if rank == 0:
        said = told(step, rows(rank))
        assert "(rank 0) waited for another that does not answer" in said
        assert "Timed out waiting 3000ms" in said
    dist.barrier()


def test_the_time_limit_of_messages() -> None:
    with pytest.raises(ga.ParameterError, match="timeout=0"):
        ga.TrainStep(model := make(), sgd(model), loss_fn, timeout=0)
    results_of(silent, 2)
