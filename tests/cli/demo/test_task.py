import torch

from gradaccum.cli.demo.regression import regression_task
from gradaccum.cli.demo.speeches import speeches_task


def test_real_numbers_take_the_precision_and_others_stay() -> None:
    x, y = next(iter(regression_task(50, title="", text="").loader(10, torch.float64)))
    assert (x.dtype, y.dtype) == (torch.float64, torch.float64)
    x, y = next(iter(speeches_task(title="", text="", num_speeches=4).loader(4, torch.float64)))
    assert (x.dtype, y.dtype) == (torch.int64, torch.int64)


def test_the_order_is_the_datasets() -> None:
    task = regression_task(57, title="", text="")
    whole = torch.cat([x for x, _ in task.loader(40, torch.float32)])
    assert torch.equal(whole, torch.cat([x for x, _ in task.loader(10, torch.float32)]))


def test_a_short_last_batch_counts_as_an_update() -> None:
    assert [regression_task(n, title="", text="").updates_per_epoch for n in (40, 41, 80)] == [1, 2, 2]
