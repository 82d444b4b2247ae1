"""The search against machines that are made up: a time for a size, a limit of memory, and both may change."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradaccum.fit.size_search import SizeSearch

SEARCHED_UPDATES = 3
ALLOWED = 1.10  # of the best candidate's time: what a chosen size may take


@dataclass
class Machine:
    """Runs what a search decides."""

    seconds_of: Callable[[int], float] = float  # the time of a piece of so many samples
    limit: float = float("inf")  # elements that fit into memory
    noise: float = 0.0  # the largest part of itself by which a time is longer than it should be
    random: Random = field(default_factory=lambda: Random(0))
    updates: int = 0
    failures: list[tuple[int, int]] = field(default_factory=list)  # sizes that did not fit, and in which update

    def update(self, search: SizeSearch, rows: int, elements: int = 1) -> Sequence[int]:
        """One update, in as many attempts as it takes; the sizes of the last one."""
        for _ in range(200):
            sizes = search.sizes(rows, elements)
            assert sum(sizes) == rows
            assert min(sizes) >= 1
            failed = self._attempt(search, sizes, elements)
            if failed is None:
                search.updated(sizes, elements)
                self.updates += 1
                return sizes
            self.failures.append((failed, self.updates))
            assert search.failed(failed, elements) == (failed > 1)
            assert failed > 1, "one sample does not fit"
        raise AssertionError("it never ends")

    def _attempt(self, search: SizeSearch, sizes: Sequence[int], elements: int) -> int | None:
        for size in sizes:
            if size * elements > self.limit:
                return size
            if search.wants_times:
                search.ran(size, self.seconds_of(size) * (1 + self.noise * self.random.random()), elements)
        return None


def of_cache(fits: int, penalty: float) -> Callable[[int], float]:
    """Pieces up to so many samples stay in the cache; beyond it each sample takes longer."""
    return lambda n: 1.0 + n + penalty * max(0, n - fits)


MACHINES: dict[str, Callable[[int], float]] = {
    "fixed time rules": lambda n: 100 + 0.01 * n,
    "affine": lambda n: 5 + n,
    "hardly any fixed time": lambda n: 0.001 + n,
    "cache of 4": of_cache(4, 1.0),
    "cache of 32": of_cache(32, 0.5),
    "waves of 8": lambda n: 1.0 + -(-n // 8) * 8,
    "superlinear": lambda n: 10 + n**1.5,
}


def searched(machine: Machine, rows: int, *, updates: int = SEARCHED_UPDATES, elements: int = 1) -> SizeSearch:
    search = SizeSearch()
    for _ in range(updates):
        machine.update(search, rows, elements)
    return search


def candidates(rows: int) -> list[int]:
    sizes = [rows]
    while sizes[-1] > 2:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def time_at(size: int, rows: int, seconds_of: Callable[[int], float]) -> float:
    """A batch in equal pieces of at most a size."""
    pieces = -(-rows // size)
    small, longer = divmod(rows, pieces)
    return longer * seconds_of(small + 1) + (pieces - longer) * seconds_of(small)


# --------------------------------------------------------------------------------------------------- the fastest size
RUNS = {
    **{f"{rows} rows": (rows, Machine.limit, 0.0, 0) for rows in (4, 8, 32, 100, 256, 1000, 1024)},
    **{f"noise of three percent, {seed}": (256, Machine.limit, 0.03, seed) for seed in range(20)},
    **{f"up to {limit} fit": (256, limit, 0.0, 0) for limit in (1, 2, 3, 5, 17, 63, 64, 65, 200, 255)},
}


@pytest.mark.parametrize(("rows", "limit", "noise", "seed"), RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", MACHINES)
def test_three_updates_find_a_size_within_ten_percent_of_the_best(
    name: str, rows: int, limit: float, noise: float, seed: int
) -> None:
    machine = Machine(MACHINES[name], limit=limit, noise=noise, random=Random(seed))
    search = searched(machine, rows)
    assert not search.wants_times
    sizes = machine.update(search, rows)
    fitting = [size for size in candidates(rows) if size <= limit] or [1]
    assert max(sizes) <= limit
    best = min(time_at(n, rows, machine.seconds_of) for n in fitting)
    assert sum(map(machine.seconds_of, sizes)) <= ALLOWED * best


def test_the_first_piece_of_a_size_is_slow_and_is_not_believed() -> None:
    """What warms up (kernels chosen, memory asked for) does so once a size."""
    seen: set[int] = set()

    def seconds_of(n: int) -> float:
        factor = 1.0 if n in seen else 1.5
        seen.add(n)
        return (1 + n) * factor

    machine = Machine(seconds_of)
    sizes = machine.update(searched(machine, 64), 64)
    assert sum(1.0 + n for n in sizes) <= ALLOWED * (1 + 64)


def test_of_two_alike_the_smaller_one() -> None:
    assert searched(Machine(float), 64).best_size() == 2


@pytest.mark.parametrize("rows", range(2, 70))
def test_the_first_update_runs_each_candidate_below_the_batch(rows: int) -> None:
    sizes = SizeSearch().sizes(rows, 1)
    assert sizes == sorted(sizes)  # small ones first, so that what fails fails late
    assert set(sizes) <= {*range(1, rows)} or rows == 2
    if rows & (rows - 1) == 0 and rows > 2:
        assert set(sizes) == set(candidates(rows)) - {rows}


@pytest.mark.parametrize("rows", range(2, 70))
def test_a_single_sample_is_run_only_where_two_do_not_fit(rows: int) -> None:
    if rows == 3:
        pytest.skip("3 is either itself or 1 + 2")
    machine, search = Machine(lambda n: 5.0 + n), SizeSearch()
    for _ in range(SEARCHED_UPDATES + 1):
        assert 1 not in machine.update(search, rows)


def test_where_no_two_batches_are_alike_the_search_ends_all_the_same() -> None:
    machine, search = Machine(lambda n: 5.0 + n), SizeSearch()
    for rows in range(40, 60):
        machine.update(search, rows)
    assert search.fastest is not None


def test_a_short_first_batch_decides_nothing_for_long_ones() -> None:
    machine, search = Machine(lambda n: 5.0 + n), SizeSearch()
    machine.update(search, 3)
    for _ in range(40):
        sizes = machine.update(search, 256)
    assert sum(map(machine.seconds_of, sizes)) <= ALLOWED * time_at(256, 256, machine.seconds_of)


def test_a_short_last_batch_does_not_disturb_the_search() -> None:
    machine, search = Machine(lambda n: 100.0 + n), SizeSearch()
    for rows in (256, 13, 256, 13, 256):
        machine.update(search, rows)
    assert search.fastest == 256
    assert machine.update(search, 13) == [13]


# ------------------------------------------------------------------------------------------------------------ memory
def test_failures_get_rarer_where_memory_stays_short() -> None:
    machine, search = Machine(lambda n: 5.0 + n, limit=100), SizeSearch()
    for _ in range(10_000):
        machine.update(search, 256)
    first, later = ([at for _, at in machine.failures if low <= at < high] for low, high in ((0, 1000), (1000, 10_000)))
    # Waits of 8, 16, ..., 1,024 updates: 7 of them in the first 1,000, then one in 1,024.
    assert len(first) <= 9
    assert len(later) <= 10


@pytest.mark.parametrize("make", [SizeSearch, SizeSearch.of_memory_only], ids=["by time", "of memory only"])
@pytest.mark.parametrize(
    ("seconds_of", "limits", "best"),
    [
        (lambda n: 100.0 + n, [float("inf")] * 10 + [10] * 20, 256),
        (lambda n: 100.0 + n, [20] * 10, 256),
        (of_cache(16, 2.0), [16] * 10, 16),
    ],
    ids=["memory was short for a while", "never reached before", "not to what is slower: it leaves the cache"],
)
def test_the_size_grows_back(
    make: Callable[[], SizeSearch], seconds_of: Callable[[int], float], limits: list[float], best: int
) -> None:
    machine, search = Machine(seconds_of), make()
    best = best if search.wants_times else 256
    for machine.limit in limits:
        assert max(machine.update(search, 256)) <= machine.limit
    machine.limit = float("inf")
    for _ in range(2000):
        sizes = machine.update(search, 256)
    assert sum(map(machine.seconds_of, sizes)) <= ALLOWED * time_at(best, 256, machine.seconds_of)
    assert best < 256 or sizes == [256]


def test_of_memory_only_nothing_is_cut_until_it_fails() -> None:
    machine, search = Machine(of_cache(4, 9.0)), SizeSearch.of_memory_only()
    assert [machine.update(search, rows) for rows in (256, 13, 1, 500)] == [[256], [13], [1], [500]]
    assert not search.wants_times
    machine.limit = 100
    assert max(machine.update(search, 256)) == 86, "three equal pieces"


@pytest.mark.parametrize("make", [SizeSearch, SizeSearch.of_memory_only], ids=["by time", "of memory only"])
@pytest.mark.parametrize(
    ("rows", "limit", "best"), [(24, 11, 8), (24, 12, 12), (256, 100, 86), (7, 3, 3), (96, 17, 16)]
)
def test_pieces_are_as_large_as_equal_pieces_can_be(
    make: Callable[[], SizeSearch], rows: int, limit: int, best: int
) -> None:
    machine, search = Machine(lambda n: 100.0 + n, limit=limit), make()
    for _ in range(SEARCHED_UPDATES):
        machine.update(search, rows)
    assert max(machine.update(search, rows)) == best


def test_the_first_piece_of_a_size_that_is_tried_again_is_slow_and_is_not_believed() -> None:
    """On a busy machine, or where memory is asked for anew, however slow the first one is."""
    seen: set[int] = set()

    def seconds_of(n: int) -> float:
        factor = 1.0 if n in seen else 50.0
        seen.add(n)
        return (100.0 + n) * factor

    machine = Machine(seconds_of, limit=4)
    search = searched(machine, 64, updates=20)
    machine.limit = float("inf")
    for _ in range(400):
        sizes = machine.update(search, 64)
    assert sizes == [64]


def test_a_size_that_lost_while_the_machine_was_busy_is_tried_again() -> None:
    machine = Machine(lambda n: 100.0 + n, limit=8)
    search = searched(machine, 64, updates=20)
    machine.limit = float("inf")
    machine.seconds_of = of_cache(8, 9.0)  # large pieces are slow, but not for ever
    for _ in range(200):
        sizes = machine.update(search, 64)
    assert max(sizes) == 8
    machine.seconds_of = lambda n: 100.0 + n
    for _ in range(2000):
        sizes = machine.update(search, 64)
    assert sizes == [64]


def test_a_size_that_loses_is_tried_less_and_less_often() -> None:
    machine = Machine(of_cache(8, 9.0), limit=8)
    search = searched(machine, 64, updates=20)
    machine.limit = float("inf")
    slow = [max(machine.update(search, 64)) > 8 for _ in range(5000)]
    assert sum(slow[:1000]) < 30
    assert sum(slow[1000:]) < 20


# ----------------------------------------------------------------------------------------------------------- lengths
def test_longer_samples_get_smaller_pieces() -> None:
    machine = Machine(of_cache(16, 2.0))
    search = searched(machine, 256, updates=4, elements=100)
    assert search.fastest == 16 * 100
    for elements, size in ((400, 4), (1600, 1), (50, 32)):
        assert max(machine.update(search, 256, elements)) == size


def test_a_longer_length_never_fails_at_what_a_shorter_one_has_shown() -> None:
    machine = Machine(lambda n: 100.0 + n, limit=2000)
    search = searched(machine, 64, updates=4, elements=100)
    before = len(machine.failures)
    assert max(machine.update(search, 64, elements=200)) <= 10
    assert max(machine.update(search, 64, elements=300)) <= 6
    assert len(machine.failures) == before


def varying(machine: Machine, search: SizeSearch, updates: int, lengths: tuple[int, int] = (100, 1000)) -> float:
    """Updates of 64 rows of random lengths; the part of what fits that their largest pieces use on average."""
    used = []
    for _ in range(updates):
        elements = machine.random.randint(*lengths)
        size = max(machine.update(search, 64, elements))
        used.append(size / max(1, min(64, machine.limit // elements)))
    return sum(used) / len(used)


@pytest.mark.parametrize("make", [SizeSearch, SizeSearch.of_memory_only], ids=["by time", "of memory only"])
def test_samples_of_every_length_use_the_memory_there_is(make: Callable[[], SizeSearch]) -> None:
    machine, search = Machine(lambda n: 100.0 + n, limit=8000), make()
    varying(machine, search, 500)
    before = len(machine.failures)
    # Halving may leave half of what fits, and rounding down to whole samples some of the rest.
    assert varying(machine, search, 2000) > 0.45
    assert len(machine.failures) - before < 60


def test_the_size_grows_back_where_no_two_batches_are_of_one_length() -> None:
    machine, search = Machine(lambda n: 100.0 + n, limit=2000), SizeSearch.of_memory_only()
    varying(machine, search, 100)
    machine.limit = 100_000
    varying(machine, search, 3000)
    assert varying(machine, search, 200) > 0.9


# ------------------------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("limit", [float("inf"), 20])
def test_the_state_makes_another_run_go_on(limit: float) -> None:
    machine = Machine(of_cache(64, 1.0), limit=limit)
    search = searched(machine, 256, updates=4)
    resumed = SizeSearch()
    resumed.load_state_dict(json.loads(json.dumps(search.state_dict())))
    failures = len(machine.failures)
    assert not resumed.wants_times
    assert resumed.sizes(256, 1) == search.sizes(256, 1)
    machine.update(resumed, 256)
    assert len(machine.failures) == failures


def test_a_state_from_within_the_search_starts_it_again() -> None:
    machine, resumed = Machine(lambda n: 100.0 + n), SizeSearch()
    resumed.load_state_dict(searched(machine, 256, updates=1).state_dict())
    assert resumed.wants_times
    for _ in range(SEARCHED_UPDATES):
        machine.update(resumed, 256)
    assert resumed.fastest == 256


def test_a_search_of_memory_only_stays_one() -> None:
    search = SizeSearch.of_memory_only()
    resumed = SizeSearch.of_memory_only()
    resumed.load_state_dict(json.loads(json.dumps(search.state_dict())))
    assert resumed.sizes(1000, 7) == [1000]


# ----------------------------------------------------------------------------------------------------------- always
# Rows, elements, and a limit with which one sample of the longest fits.
BATCHES = st.tuples(st.integers(1, 70), st.sampled_from([1, 2, 3, 10, 100]), st.integers(100, 8000))


@given(batches=st.lists(BATCHES, min_size=1, max_size=60), by_time=st.booleans(), seed=st.integers(0, 9))
def test_sizes_add_up_and_fit_whatever_happens(batches: list[tuple[int, int, int]], by_time: bool, seed: int) -> None:
    search = SizeSearch() if by_time else SizeSearch.of_memory_only()
    machine = Machine(lambda n: 5.0 + n, noise=0.5, random=Random(seed))
    for rows, elements, limit in batches:
        machine.limit = limit
        before = len(machine.failures)
        sizes = machine.update(search, rows, elements)  # that sizes add up is asserted there
        assert max(sizes) * elements <= limit
        # Two failures halve what is tried next, and a trial adds one more.
        assert len(machine.failures) - before <= 2 * rows.bit_length() + 1


@given(rows=st.integers(2, 300), limit=st.integers(1, 300), updates=st.integers(1, 60))
def test_what_has_failed_is_tried_again_only_as_a_first_piece(rows: int, limit: int, updates: int) -> None:
    search, machine = SizeSearch(), Machine(lambda n: 5.0 + n, limit=limit)
    smallest = rows + 1  # that has failed
    for _ in range(updates):
        sizes = search.sizes(rows, 1)
        above = [index for index, size in enumerate(sizes) if size >= smallest]
        assert above in ([], [0])
        machine.update(search, rows)
        smallest = min((size for size, _ in machine.failures), default=smallest)
