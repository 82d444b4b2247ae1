"""Global batches are the same for every number of processes."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, TensorDataset

import gradaccum as ga

SIZE, BATCH = 37, 8  # 37 is a prime: the last batch has 5


def epochs(world_size: int, count: int = 2, **options: object) -> list[list[list[int]]]:
    """Each global batch of some epochs as the shares of all ranks."""
    samplers = [
        ga.GlobalBatchSampler(SIZE, BATCH, rank=rank, world_size=world_size, **options)  # type: ignore[arg-type]
        for rank in range(world_size)
    ]
    return [list(shares) for _ in range(count) for shares in zip(*samplers, strict=True)]


def whole(batches: list[list[list[int]]]) -> list[list[int]]:
    return [list(itertools.chain(*shares)) for shares in batches]


@given(world_size=st.integers(1, 12), seed=st.integers(0, 99), shuffle=st.booleans(), drop_last=st.booleans())
def test_global_batches_do_not_depend_on_the_processes(
    world_size: int, seed: int, shuffle: bool, drop_last: bool
) -> None:
    batches = epochs(world_size, seed=seed, shuffle=shuffle, drop_last=drop_last)
    assert whole(batches) == whole(epochs(1, seed=seed, shuffle=shuffle, drop_last=drop_last))
    for shares in batches:
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
    first, second = whole(batches[: len(batches) // 2]), whole(batches[len(batches) // 2 :])
    assert [len(batch) for batch in first] == [8] * 4 + [5] * (not drop_last)
    assert drop_last or sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(SIZE))
    assert (first != second) == shuffle


def test_proportions() -> None:
    batches = epochs(3, proportions=[2, 1, 1])
    assert [[len(share) for share in shares] for shares in batches[:5]] == [[4, 2, 2]] * 4 + [[2, 2, 1]]
    assert whole(batches) == whole(epochs(1))
    assert [len(shares[1]) for shares in epochs(2, proportions=[1, 0])] == [0] * 10


FEW = st.integers(1, 4)


@given(updates=st.integers(0, 17), before=FEW, after=FEW, drop_last=st.booleans(), ahead=st.integers(0, 3))
def test_goes_on_with_another_number_of_processes(
    updates: int, before: int, after: int, drop_last: bool, ahead: int
) -> None:
    """Also where the loader had read ``ahead`` of what was trained with."""
    expected = whole(epochs(1, 8, drop_last=drop_last))  # 17 updates are up to five of them, and two more follow
    first = ga.GlobalBatchSampler(SIZE, BATCH, rank=0, world_size=before, drop_last=drop_last)
    stream = itertools.chain.from_iterable(iter(first) for _ in itertools.count())
    for _ in range(updates + ahead):
        next(stream)
    samples = sum(len(batch) for batch in expected[:updates])
    state = first.state_dict(samples=samples)
    assert (state["updates"], state["samples"]) == (updates, samples)
    later = [ga.GlobalBatchSampler(SIZE, BATCH, rank=r, world_size=after, drop_last=drop_last) for r in range(after)]
    for sampler in later:
        sampler.load_state_dict(state)
    per_epoch = len(first)
    rest = whole([list(shares) for _ in range(2) for shares in zip(*later, strict=True)])
    assert rest == expected[updates : updates + len(rest)]
    assert len(rest) == 2 * per_epoch - updates % per_epoch


def test_loader_with_an_empty_share() -> None:
    data = TensorDataset(torch.arange(5.0)[:, None], torch.arange(5))
    shares = []
    for rank in range(3):
        sampler = ga.GlobalBatchSampler(5, 3, rank=rank, world_size=3, shuffle=False)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=sampler.collate(data))
        shares.append([(x.shape, y.tolist()) for x, y in loader])
    assert shares == [[((1, 1), [0]), ((1, 1), [3])], [((1, 1), [1]), ((1, 1), [4])], [((1, 1), [2]), ((0, 1), [])]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4), {}, "dataset_size=0"),
        ((10, 0), {}, "batch_size=0"),
        ((10, 2.0), {}, "batch_size=2.0"),
        ((10, 4), {"rank": 2, "world_size": 2}, "rank=2 of world_size=2"),
        ((3, 4), {"drop_last": True}, "an epoch would be empty"),
        ((10, 4), {"rank": 0, "world_size": 2, "proportions": [1]}, "one number for each of the 2"),
        ((10, 4), {"rank": 0, "world_size": 2, "proportions": [0, 0]}, "not all 0"),
    ],
)
def test_bad_input(arguments: tuple[int, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(ga.WindowError, match=message):
        ga.GlobalBatchSampler(*arguments, **options)  # type: ignore[arg-type]


def test_states_that_do_not_fit() -> None:
    sampler = ga.GlobalBatchSampler(SIZE, BATCH)
    next(iter(sampler))
    state = sampler.state_dict()
    with pytest.raises(ga.StateError, match="batch_size=8, and this sampler has 4"):
        ga.GlobalBatchSampler(SIZE, 4).load_state_dict(state)
    with pytest.raises(ga.StateError, match="seed=0, and this sampler has 1"):
        ga.GlobalBatchSampler(SIZE, BATCH, seed=1).load_state_dict(state)
    with pytest.raises(ga.StateError, match="no count of updates"):
        sampler.load_state_dict({})
    with pytest.raises(ga.StateError, match="5 samples are not where"):
        sampler.state_dict(samples=5)
    with pytest.raises(ga.StateError, match="16 samples are not where"):
        sampler.state_dict(samples=16)
