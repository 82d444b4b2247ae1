"""What in a sentence is set as code, and what stays prose."""

import pytest

from gradaccum.auditing import culprits
from gradaccum.report.code_words import code_in


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("In a new model nn.GroupNorm.", ["nn.GroupNorm"]),
        ('type ga.TrainStep(model, f, batch_norm="exact"); or so', ['ga.TrainStep(model, f, batch_norm="exact")']),
        ("call ga.criterion(nn.NLLLoss(...))(output, target).", ["ga.criterion(nn.NLLLoss(...))(output, target)"]),
        ('with "exact" the gradient is right, "frozen" costs nothing', ['"exact"', '"frozen"']),
        ("in the layer x = ga.gather(x) where it looks", ["x = ga.gather(x)"]),
        ("one forward, with torch.no_grad(): model(x), before", ["with torch.no_grad(): model(x)"]),
        ("clip_norm=. Or pass forward= and groups=8 to it", ["clip_norm=", "forward=", "groups=8"]),
        ('return {"loss": loss, "aux": f(aux, over=n)}.', ['return {"loss": loss, "aux": f(aux, over=n)}']),
        ("return 0.5 * f(x) + g(x). Then", ["return 0.5 * f(x) + g(x)"]),
        (
            "and weights=lambda batch: (batch[1] != -100).sum() Or: more",
            ["weights=lambda batch: (batch[1] != -100).sum()"],
        ),
        ("it takes memory='24GiB' of micro_batch_size", ["memory='24GiB'", "micro_batch_size"]),
        ("outputs[0] and outputs [0]", ["outputs[0]"]),
    ],
)  # fmt: skip
def test_code(text: str, code: list[str]) -> None:
    assert list(code_in(text)) == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "return the loss as a plain tensor, which is taken as a mean over samples",
        "The loss is a mean (over labels), e.g. of 1.6e-16 or 24.5 GiB; it's 'known'.",
        "a call f(x that is not closed, and f(x] that is closed by another",
        'what is said: "two words" and micro-batches, samples/s, 3 = 4',
        "with nothing: nothing",
    ],
)
def test_prose(text: str) -> None:
    assert code_in(text) == ()


def test_pieces_are_in_the_text_in_their_order() -> None:
    for fault in (one for one in vars(culprits).values() if isinstance(one, culprits.Fault)):
        for rest in (fault.what, fault.remedy, fault.price):
            for piece in code_in(rest):
                _, found, rest = rest.partition(piece)
                assert found == piece


def test_every_remedy_of_the_table_that_is_code_has_some() -> None:
    calls = [one.remedy for one in vars(culprits).values() if isinstance(one, culprits.Fault) and "(" in one.remedy]
    assert len(calls) > 5
    for remedy in calls:
        assert code_in(remedy), remedy
