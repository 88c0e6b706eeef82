"""What the engine says, in another language: its sentences are found by their form.

A sentence that is known as "{part} is on cuda:{n}." is told by the words around its {names}. Most of what is
filled in stays as it is: numbers, files, what somebody typed, or is to type. What is words of the engine in
turn (`SPOKEN`) is looked up among the `pieces`, which are no sentences: phases, reasons, lists of components.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

FIELD = re.compile(r"\{(\w+)\}")
SPOKEN = frozenset(
    ("changes", "due", "faults", "kind", "more", "part", "parts", "phase", "problem", "way", "where", "why")
)
KNOWN = ("field", "component")  # must be pieces: anything can be said in the form of "{field} is {value}"
LISTS = (re.compile("(; )"), re.compile("(, | and | or )"))  # what joins them is a piece, too
LONGEST = 1000  # letters; what is longer is hardly the engine's own, and sentences in sentences go deep
STOP = re.compile(r"(?<=\.) ")


def fill(text: str, values: Mapping[str, object], *, apart: bool = False) -> str:
    """The text with its {names} filled in. In a language that is written from the right each value is kept
    `apart`: its own direction is not to change that of the words around it."""
    form = "\u2068{}\u2069" if apart else "{}"  # an isolate, whose first letter decides its direction
    return FIELD.sub(lambda name: form.format(values[name[1]]) if name[1] in values else name[0], text)


class Form(NamedTuple):
    """A text with {names} in it: what stands around them, and the same in another language."""

    around: list[str]
    names: list[str]
    known: str

    def values(self, text: str) -> dict[str, str] | None:
        """What the text has in place of the names; None for a text of another form."""
        first, *between, last = self.around
        if not (text.startswith(first) and text.endswith(last)):
            return None
        found, start, end = [], len(first), len(text) - len(last)
        for words in between:
            at = text.find(words, start + 1, end)
            if at < 0:
                return None
            found.append(text[start:at])
            start = at + len(words)
        return dict(zip(self.names, [*found, text[start:end]], strict=True)) if start < end else None


def forms(texts: Mapping[str, str]) -> list[Form]:
    """Those of the texts that have {names}, without their full stops. What begins with words of its own comes
    first, then the longest: it says the most."""
    rows = []
    for text, known in texts.items():
        if names := FIELD.findall(text):
            around = FIELD.sub("\0", text.removesuffix(".")).split("\0")
            rows.append(Form(around, names, known.removesuffix(".")))
    return sorted(rows, key=lambda row: (not row.around[0], -sum(map(len, row.around))))


@dataclass(frozen=True)
class Sentences:
    """`words` are what the page itself calls things; `apart` is that of `fill`."""

    sentences: Mapping[str, str] = field(default_factory=dict, repr=False)
    pieces: Mapping[str, str] = field(default_factory=dict, repr=False)
    words: Mapping[str, str] = field(default_factory=dict, repr=False)
    apart: bool = False

    def told(self, text: str) -> str:
        """A sentence, or several; what is not known stays as it is."""
        if len(text) > LONGEST:
            return text
        known = self._word(text)
        if known is None and ". " in text:
            known = self._sentence(text, self._long) or self._each(text)
        return known or self._sentence(text, self._forms) or self._about(text) or text

    def _about(self, text: str) -> str | None:
        """A sentence behind the name of what it is about."""
        name, colon, sentence = text.partition(": ")
        known = self._word(sentence) or self._sentence(sentence, self._forms)
        return f"{name}{colon}{known}" if known else None

    def _each(self, text: str) -> str | None:
        """Sentence by sentence; None if none is known."""
        parts = STOP.split(text)
        told = [self._word(part) or self._sentence(part, self._forms) for part in parts]
        return " ".join(known or part for known, part in zip(told, parts, strict=True)) if any(told) else None

    def _sentence(self, text: str, rows: Sequence[Form]) -> str | None:
        """By its form; its full stop belongs to it or not."""
        bare = text.removesuffix(".")
        known = self._formed(rows, bare)
        return f"{known}{text[len(bare) :]}" if known else None

    def _piece(self, text: str) -> str | None:
        """A part of a sentence, or a list of them of which at least one is known."""
        if known := self._word(text) or self._formed(self._pieces, text, whole=True):
            return known
        for joint in LISTS:
            parts = joint.split(text)  # every other one is what joins them
            told = [self._word(part) or self._formed(self._pieces, part) for part in parts]
            if any(told[::2]) and len(parts) > 1:
                return "".join(known or part for known, part in zip(told, parts, strict=True))
        return self._formed(self._pieces, text)

    def _word(self, text: str) -> str | None:
        """A text that is known as it is, or but for its capital."""
        for asked in (text, text[:1].lower() + text[1:]):
            for table in (self.sentences, self.pieces, self.words):
                if asked in table:
                    known = table[asked]
                    return known if asked == text else known[:1].upper() + known[1:]
        return None

    def _formed(self, rows: Sequence[Form], text: str, *, whole: bool = False) -> str | None:
        """By its form; a `whole` one has no lists filled in, or else it may be one of a list itself."""
        for form in rows:
            values = form.values(text)
            if values is None or any(values[name] not in self.pieces for name in KNOWN if name in values):
                continue
            if not whole or not any(joint.search(value) for joint in LISTS for value in values.values()):
                told = {name: self._value(name, value) for name, value in values.items()}
                return fill(form.known, told, apart=self.apart)
        return None

    def _value(self, name: str, text: str) -> str:
        if name not in SPOKEN:
            return self.pieces.get(text, text)
        told = self.told(text)
        return told if told != text else self._piece(text) or text

    @cached_property
    def _forms(self) -> list[Form]:
        return forms(self.sentences)

    @cached_property
    def _long(self) -> list[Form]:
        """Those of several sentences."""
        return [form for form in self._forms if any(". " in words for words in form.around)]

    @cached_property
    def _pieces(self) -> list[Form]:
        return forms(self.pieces)
