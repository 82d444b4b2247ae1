import torch

from gradaccum.cli.demo.speeches import PADDING, CharacterModel, Speeches, load_speeches, pad, speeches_task


def test_the_speeches_are_shipped() -> None:
    speeches = load_speeches(1_000)
    assert len(speeches) == 1_000
    assert speeches[0] == "First Citizen:\nBefore we proceed any further, hear me speak."
    assert all(speech.strip() for speech in speeches)


def test_characters_are_numbered_from_1() -> None:
    dataset = Speeches(["abba", "c"])
    assert dataset.vocabulary == 4
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[1, 2, 2, 1], [3]]


def test_targets_are_the_next_characters_and_padding_is_ignored() -> None:
    x, y = pad([torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    assert x.tolist() == [[1, 2], [4, 5]]
    assert y.tolist() == [[2, 3], [5, PADDING]]


def test_nothing_sees_what_follows() -> None:
    model = CharacterModel(5)
    x = torch.tensor([[1, 2, 3, 4, 1, 2]])
    changed = x.clone()
    changed[0, 4] = 3
    before, after = model(x), model(changed)
    assert before.shape == (1, 5, 6)
    torch.testing.assert_close(before[..., :4], after[..., :4], rtol=0, atol=0)
    assert not torch.equal(before[..., 4], after[..., 4])


def test_the_task_is_uneven() -> None:
    task = speeches_task(title="", text="")
    counts = [task.count(y) for _, y in task.loader(task.micro_batch_size, torch.float32)]
    assert (min(counts), max(counts)) == (332, 1_478)  # as the demo says
    assert task.num_samples % task.batch_size  # the last window is short too


def test_the_model_is_the_same_every_time_and_leaves_the_random_state() -> None:
    task = speeches_task(title="", text="", num_speeches=5)
    state = torch.get_rng_state()
    for a, b in zip(task.model().parameters(), task.model().parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
