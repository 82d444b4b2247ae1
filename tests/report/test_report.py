"""Optional dependencies: what is missing is named, and what to type."""

import sys

import pytest

import gradaccum as ga
from gradaccum.report import extra_needed


def test_what_is_missing_and_what_to_type_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    message = r"^A bar needs 'tqdm', which is not installed\. Type: pip install tqdm; it is in the extra 'cli' of this "
    with pytest.raises(ga.MissingExtraError, match=message), extra_needed("cli", "A bar"):
        import tqdm  # noqa: F401  # type: ignore[import-untyped]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(ModuleNotFoundError(name="tqdm"), ImportError, id="it is an import error too"),
        pytest.param(ModuleNotFoundError("of a module that a module needs"), ImportError, id="nothing has a name"),
        pytest.param(ModuleNotFoundError(name="gradaccum.nothing"), ModuleNotFoundError, id="our own mistake"),
        pytest.param(ZeroDivisionError(), ZeroDivisionError, id="other errors pass"),
    ],
)
def test_errors(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as caught, extra_needed("cli", "A bar"):
        raise error
    assert isinstance(caught.value, ga.MissingExtraError) is (expected is ImportError)
