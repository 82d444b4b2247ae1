"""Which parts of a sentence are Python, so that a page can set them as code.

Sentences about code name calls, options and attributes in the middle of prose. What is taken for code:

    ga.gather(x), output[0]        a name with brackets right behind it
    nn.GroupNorm, batch_loss       a name with a dot or an underscore in it
    clip_norm=, mode="sum"         an option, with its value
    "exact"                        a single word in double quotes
    return f(x), y = f(x)          one of these in a statement, and with f(): g(x)

It is a guess for the eye: a plain word such as ``loss`` stays prose, and nothing depends on it.
"""

from __future__ import annotations

import re

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_START = re.compile(r"(?<![\w.'\"/-])(?:[A-Za-z_]|\"[\w-]+\")")
_STRING = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'")
_NUMBER = re.compile(r"-?\d[\w.]*(?<!\.)")
_OPERATOR = re.compile(r" (?:[-+*/@<>]|[!=<>]=) ")
_LAMBDA = re.compile(r"lambda\b[^:()]*: ")
_STATEMENT = re.compile(r"return (?=\S)|with (?=\S)|[A-Za-z_][\w.]* = ")
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_NOT_CODE = ("e.g", "i.e")


def code_in(text: str) -> tuple[str, ...]:
    """Returns the pieces of a text that are code, in their order."""
    found: list[str] = []
    position = 0
    while match := _START.search(text, position):
        start = match.start()
        end = _statement(text, start) or _piece(text, start)
        if end is None:
            word = _PATH.match(text, start)
            position = match.end() if word is None else word.end()
        else:
            found.append(text[start:end])
            position = end
    return tuple(found)


def _statement(text: str, start: int) -> int | None:
    """Where a statement ends that starts here; it is one only if something in it is code by itself."""
    match = _STATEMENT.match(text, start)
    if match is None:
        return None
    end = _expression(text, match.end())
    if end is None or (text[match.end()] not in _CLOSES and not _is_code(text[match.end() : end])):
        return None
    if match[0] == "with ":
        return _expression(text, end + 2) if text[end : end + 2] == ": " else None
    return end


def _piece(text: str, start: int) -> int | None:
    end = _atom(text, start)
    return end if end is not None and _is_code(text[start:end]) else None


def _is_code(piece: str) -> bool:
    return piece not in _NOT_CODE and any(mark in piece for mark in "._([=\"'")


def _expression(text: str, start: int) -> int | None:
    """Where atoms with operators between them end."""
    prefix = _LAMBDA.match(text, start)
    end = _atom(text, prefix.end() if prefix else start)
    while end is not None and (operator := _OPERATOR.match(text, end)):
        following = _atom(text, operator.end())
        if following is None:
            break
        end = following
    return end


def _atom(text: str, start: int) -> int | None:
    """Where a string, a number, a bracket or a name ends, with all that is attached to it."""
    if start < len(text) and text[start] in _CLOSES:
        end = _closing(text, start)
    else:
        match = next((found for one in (_STRING, _NUMBER, _PATH) if (found := one.match(text, start))), None)
        end = None if match is None else match.end()
    while end is not None and end < len(text):
        attribute = _PATH.match(text, end + 1) if text[end] == "." else None
        following = attribute.end() if attribute else _closing(text, end) if text[end] in "([" else None
        if following is None:
            break
        end = following
    if end is not None and text[end : end + 1] == "=" and text[end + 1 : end + 2] != "=":
        return _expression(text, end + 1) or end + 1
    return end


def _closing(text: str, start: int) -> int | None:
    """The end of a bracket that opens here; None where it is not closed."""
    expected: list[str] = []
    position = start
    while position < len(text):
        if string := _STRING.match(text, position):
            position = string.end()
            continue
        if text[position] in _CLOSES:
            expected.append(_CLOSES[text[position]])
        elif text[position] in ")]}" and expected.pop() != text[position]:
            return None
        position += 1
        if not expected:
            return position
    return None
