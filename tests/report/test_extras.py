import sys

import pytest

import gradaccum as ga
from gradaccum.report.extras import extra_needed


def test_what_is_missing_and_what_to_type_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    message = r"^A bar needs 'tqdm', which is not installed\. Type: pip install 'gradaccum\[cli\]'$"
    with pytest.raises(ga.MissingExtraError, match=message), extra_needed("cli", "A bar"):
        import tqdm  # noqa: F401  # type: ignore[import-untyped]


def test_it_is_an_import_error_too() -> None:
    with pytest.raises(ImportError), extra_needed("cli", "A bar"):
        raise ModuleNotFoundError(name="tqdm")


def test_our_own_missing_module_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, extra_needed("cli", "A bar"):
        raise ModuleNotFoundError(name="gradaccum.nothing")
    assert not isinstance(caught.value, ga.MissingExtraError)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), extra_needed("cli", "A bar"):
        1 / 0  # noqa: B018
