import torch

from gradaccum.cli.demo.regression import regression_task


def test_the_published_setting() -> None:
    task = regression_task(1_000, title="", text="")
    assert (task.num_samples, task.batch_size, task.micro_batch_size, task.micro_batches) == (1_000, 40, 10, 4)
    assert (task.epochs, task.updates_per_epoch, task.updates) == (3, 25, 75)
    model = task.model()
    assert all(not parameter.any() for parameter in model.parameters())
    optimizer = task.optimizer(model.parameters())
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.01
    assert optimizer.defaults["momentum"] == 0


def test_the_data_lie_on_the_plane_but_for_the_noise() -> None:
    ((x, y),) = regression_task(1_000, title="", text="").loader(1_000, torch.float64)
    noise = y[:, 0] - (x @ torch.tensor([-2.0, 3.4], dtype=torch.float64) + 4.2)
    assert 0.009 < noise.std() < 0.011
    assert x.std(dim=0).allclose(torch.ones(2, dtype=torch.float64), atol=0.1)


def test_the_last_batch_of_957_is_short() -> None:
    task = regression_task(957, title="", text="")
    assert [len(x) for x, _ in task.loader(40, torch.float32)][-2:] == [40, 37]
    assert [len(x) for x, _ in task.loader(10, torch.float32)][-2:] == [10, 7]


def test_it_is_the_same_every_time() -> None:
    first, second = (regression_task(50, title="", text="").loader(50, torch.float32) for _ in range(2))
    for a, b in zip(next(iter(first)), next(iter(second)), strict=True):
        assert torch.equal(a, b)
