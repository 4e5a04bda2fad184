"""Regular expressions that mean to xgrammar what they mean to Python and JavaScript (vLLM has no counterpart).

xgrammar refuses what it cannot do (look-ahead, back-references, \\b), but reads a few things differently, silently:
`.` as any character, newline included; `^` and `$` inside a pattern as nothing; unknown escapes as the letter. Inside
a JSON string it writes quotes and backslashes unescaped. `normalize_regex` rewrites or refuses exactly those.

The whole text must match: what the pattern says is all that is generated. \\d and \\w are ASCII's, as in JavaScript.
"""

from __future__ import annotations

from dataclasses import dataclass

_CLASS_ESCAPES = set("dDwWsS")
_CONTROL_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}
_HEX_DIGITS = {"x": 2, "u": 4}
_UNSAFE_IN_JSON = (*(chr(code) for code in range(32)), '"', "\\")
"""What a JSON string may hold only escaped, which a pattern inside one cannot say."""


@dataclass
class _Reader:
    """Reads a pattern once, from left to right, and builds its rewritten form."""

    pattern: str
    in_json: bool
    at: int = 0

    def fail(self, what: str) -> ValueError:
        """Return the error for something at the current place."""
        return ValueError(f"regex {self.pattern!r:.200}, character {self.at}: {what}")

    def rewrite(self) -> str:
        """Return the whole pattern, rewritten."""
        parts: list[str] = []
        last = len(self.pattern) - 1
        while self.at < len(self.pattern):
            char = self.pattern[self.at]
            if char == "[":
                parts.append(self._read_class())
            elif char == "\\":
                text, literal = self._read_escape()
                self._check_literal(literal)
                parts.append(text)
            elif char == ".":
                # Inside a JSON string xgrammar leaves out what may not stand there by itself.
                parts.append("." if self.in_json else r"[^\n\r]")
                self.at += 1
            elif (char == "^" and self.at > 0) or (char == "$" and self.at < last):
                raise self.fail(f"{char!r} here is not supported; the whole text must match anyway: remove it.")
            else:
                self._check_literal(char)
                parts.append(char)
                self.at += 1
        return "".join(parts)

    def _check_literal(self, char: str | None) -> None:
        if self.in_json and char is not None and char in _UNSAFE_IN_JSON:
            raise self.fail(f"{char!r} cannot be matched inside a JSON string; leave it out of the pattern.")

    def _read_escape(self) -> tuple[str, str | None]:
        """Read from a backslash on; return (the text, the character that it stands for or None for a class)."""
        kind = self.pattern[self.at + 1 : self.at + 2]
        if not kind:
            raise self.fail("a backslash at the end escapes nothing.")
        length = 2
        literal: str | None = kind
        if kind in _CLASS_ESCAPES:
            literal = None
        elif kind in _CONTROL_ESCAPES:
            literal = _CONTROL_ESCAPES[kind]
        elif kind in _HEX_DIGITS:
            length = 2 + _HEX_DIGITS[kind]
            digits = self.pattern[self.at + 2 : self.at + length]
            if len(digits) < _HEX_DIGITS[kind] or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                raise self.fail(f"\\{kind} needs {_HEX_DIGITS[kind]} hexadecimal digits.")
            literal = chr(int(digits, 16))
        elif kind.isalnum():
            raise self.fail(f"the escape \\{kind} is not supported.")
        text = self.pattern[self.at : self.at + length]
        self.at += length
        # A plain backslash before a character that needs none is a warning of xgrammar's.
        if literal == kind and kind not in r"\.^$*+?{}[]()|/-":
            text = kind
        return text, literal

    def _read_class(self) -> str:
        """Read [...]; in a JSON string without the characters that may not stand there."""
        start = self.at
        self.at += 1
        negated = self.pattern.startswith("^", self.at)
        self.at += negated
        parts: list[str] = []
        while not self.pattern.startswith("]", self.at):
            if self.at >= len(self.pattern):
                self.at = start
                raise self.fail("[ without ].")
            text, low = self._read_member()
            high = low
            is_range = self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at)
            if is_range and low is not None:
                self.at += 1
                text_high, high = self._read_member()
                if high is None or high < low:
                    raise self.fail("a range needs two characters in order.")
                text = f"{text}-{text_high}"
            if low is None or high is None or not self.in_json or negated:
                parts.append(text)
            else:
                parts += _safe_ranges(low, high)
        self.at += 1
        if not parts:
            raise self.fail("this class is empty, or holds only characters that a JSON string must escape.")
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def _read_member(self) -> tuple[str, str | None]:
        char = self.pattern[self.at : self.at + 1]
        if char == "\\":
            return self._read_escape()
        if char == "[":
            raise self.fail("a [ inside a class must be escaped: \\[. Named and nested classes are not supported.")
        if self.pattern.startswith("&&", self.at):
            raise self.fail("&& inside a class is not supported; write one & only.")
        self.at += 1
        return char, char


def _safe_ranges(low: str, high: str) -> list[str]:
    """Return the ranges of [low-high] without the characters that a JSON string must escape."""
    ranges = []
    for first, last in ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)):
        start, end = max(first, ord(low)), min(last, ord(high))
        if start <= end:
            ranges.append(_class_char(start) if start == end else f"{_class_char(start)}-{_class_char(end)}")
    return ranges


def _class_char(code: int) -> str:
    char = chr(code)
    return "\\" + char if char in "]\\^-[" else char


def normalize_regex(pattern: str, in_json: bool = False) -> str:
    """Return `pattern` as xgrammar must see it to mean what it says.

    Args:
        pattern: what the whole text must match.
        in_json: it is the `pattern` of a JSON string: what it matches stands between quotes, unescaped.

    Raises:
        ValueError: something that xgrammar would ignore or misread; the message names it and its place.
    """
    return _Reader(pattern, in_json).rewrite()
