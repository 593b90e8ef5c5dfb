"""Contamination: which held-out prompts stand, in part or as a whole, in what is trained on.

A prompt is its user messages, one after the other. Two texts are compared by their words: letters
without case and accents, digits; punctuation, white space and what is invisible only part words. A
sign such as + or - is a word where a number follows, so that 27+5 is not 27-5. A character of a
script without spaces (Han, kana, Thai, Lao, Khmer, Myanmar) is a word of its own.

A held-out prompt is contaminated when any n words in a row of it (an n-gram) stand in a training
prompt or response: GPT-3's rule, with its n of 13 (Brown et al., 2020, appendix C; so does
EleutherAI's harness). A prompt of fewer words must be the whole of a training prompt or response.
n-grams that many held-out prompts have in common (an instruction that all end with) say nothing of
any of them, and are left out. Paraphrases and translations are not found.

Words and n-grams are compared by 64-bit hashes, all of a batch at once: among 50,000 n-grams and
250 million words two collide with a chance of 1 in 1.5 million. One pass over the training rows;
memory is that of the held-out n-grams, some 100 bytes each.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.rows import CONTAMINATION

CHUNK_BYTES = 2**17
"""Text that is worked on at once, unless one text alone is larger: fits a processor's cache."""
MOST_BYTES = 2**20
"""Of a larger text only the beginning is compared; nothing trains on a quarter million words."""
COMMON_SHARE, COMMON_PROMPTS = 0.1, 3
"""An n-gram is common that more prompts than both this share and this number have."""

JOIN, SINGLE, SIGN, DIGIT, SPACE, DROP = 1, 2, 4, 8, 16, 32
"""Kinds of characters: those of which words are made, those that are words, signs (words before a
number), digits, spaces, and those that are passed over. What is none of them parts words."""
SIGNS = {"−": "-", "–": "-", "×": "*", "÷": "/"} | {c: c for c in "+-*/^=<>%"}
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
)
_ACCENTS = (
    (0x0300, 0x036F),
    (0x1AB0, 0x1AFF),
    (0x1DC0, 0x1DFF),
    (0x20D0, 0x20FF),
    (0x3099, 0x309A),  # voiced kana
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFE20, 0xFE2F),
)
_ASCII, _RARE_HAN, _ALL = 0x80, 0x20000, 0x40000
"""Sizes of the tables, and where the planes of rare Han begin, which are what is before the larger
size; the characters beyond it part words."""
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)


class Texts(NamedTuple):
    """Some texts, each of some strings one after the other."""

    pieces: pa.Array
    """The strings, UTF-8."""
    bounds: np.ndarray
    """Text i has the pieces bounds[i] to bounds[i + 1]."""


def prompt_texts(messages: pa.ListArray) -> Texts:
    """Return the user messages of a column of conversations."""
    flat = messages.flatten()
    is_user = pc.equal(flat.field("role"), "user")
    before = np.concatenate([[0], np.cumsum(is_user.to_numpy(zero_copy_only=False))])
    offsets = messages.offsets.to_numpy()
    return Texts(flat.field("content").filter(is_user), before[offsets - offsets[0]])


def response_texts(responses: pa.Array) -> Texts:
    """Return a column of responses."""
    return Texts(responses, np.arange(len(responses) + 1))


class HeldoutNgrams:
    """The n-grams of held-out prompts, and which of them were found in training rows."""

    def __init__(self, ids: list[str], texts: list[Texts], n: int) -> None:
        """Take all held-out prompts.

        Args:
            ids: of the prompts.
            texts: theirs, in the same order, in batches.
            n: words of an n-gram; a prompt of fewer is one as a whole.
        """
        assert n >= 1, f"n-grams of {n} words"
        self.ids, self.n = ids, n
        pairs = [np.empty((2, 0), np.uint64)]
        first = 0
        for batch in texts:
            for start, words in _chunks(batch):
                hashes, owners = words.ngrams(n)
                pairs.append(np.stack([hashes, (owners + first + start).astype(np.uint64)]))
            first += len(batch.bounds) - 1
        assert first == len(ids), f"{first} texts of {len(ids)} prompts"
        hashes, owners = np.concatenate(pairs, axis=1)
        self._table, gram = np.unique(hashes, return_inverse=True)
        self._owner, self._gram = _distinct(owners.astype(np.int64), gram, len(self._table))
        self.num_common = self._leave_out_common()
        self._filter = _Filter(self._table)
        size = len(self._table)
        self._in_prompts, self._in_responses = np.zeros(size, bool), np.zeros(size, bool)
        self._example = np.full(size, -1)
        """Of each n-gram, the number of the first training row that has it."""
        self._example_ids = dict[int, str]()
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._table)

    def scan(self, ids: pa.Array, prompts: Texts, responses: Texts) -> None:
        """Look for the n-grams in some training rows."""
        for texts, found in ((prompts, self._in_prompts), (responses, self._in_responses)):
            for start, words in _chunks(texts):
                rows, grams = self._matches(words)
                found[grams] = True
                new = self._example[grams] < 0
                # Backwards, so that of several rows the first one stays.
                rows, grams = rows[new][::-1] + start, grams[new][::-1]
                self._example[grams] = rows + self._num_rows
                for row in np.unique(self._example[grams] - self._num_rows).tolist():
                    self._example_ids[self._num_rows + row] = ids[row].as_py()
        self._num_rows += len(ids)

    def report(self) -> pa.RecordBatch:
        """Return a row of CONTAMINATION for each held-out prompt, in the order they came in."""
        total = np.bincount(self._owner, minlength=len(self.ids))
        shares = [
            np.bincount(self._owner, found[self._gram], len(self.ids)) / np.maximum(total, 1)
            for found in (self._in_prompts, self._in_responses)
        ]
        columns = [
            pa.array(self.ids, pa.string()),
            pa.array(total, pa.int32()),
            *(pa.array(share, pa.float64()) for share in shares),
            pa.array(self._examples(), pa.string()),
        ]
        return pa.record_batch(columns, schema=CONTAMINATION)

    def metrics(self) -> dict[str, float]:
        """Return the shares of prompts with any n-gram found, and of all prompts' n-grams."""
        found = (self._in_prompts | self._in_responses)[self._gram]
        prompts = len(np.unique(self._owner[found]))
        return {
            "contaminated_prompt_share": prompts / max(1, len(self.ids)),
            "contaminated_ngram_share": float(found.sum()) / max(1, len(found)),
        }

    def _leave_out_common(self) -> int:
        """Leave out n-grams that many prompts have in common; return how many."""
        prompts = np.bincount(self._gram, minlength=len(self._table))
        kept = prompts <= max(COMMON_PROMPTS, COMMON_SHARE * len(self.ids))
        new_number = np.cumsum(kept) - 1
        self._table = self._table[kept]
        of_kept = kept[self._gram]
        self._owner, self._gram = self._owner[of_kept], new_number[self._gram[of_kept]]
        return int((~kept).sum())

    def _matches(self, words: "_Words") -> tuple[np.ndarray, np.ndarray]:
        """Return (text, n-gram) of all places in some texts where there is one of ours."""
        hashes, owners = words.ngrams(self.n, self._filter)
        if not len(hashes):
            return owners, np.zeros(0, np.int64)
        place = np.minimum(np.searchsorted(self._table, hashes), len(self._table) - 1)
        good = self._table[place] == hashes
        return owners[good], place[good]

    def _examples(self) -> list[str | None]:
        """Return for each prompt the training row that most of its n-grams were found in first."""
        rows = [Counter[int]() for _ in self.ids]
        found = self._example[self._gram]
        for owner, row in zip(self._owner[found >= 0], found[found >= 0], strict=True):
            rows[owner][int(row)] += 1
        best = (max(c, key=lambda row: (c[row], -row)) if c else None for c in rows)
        return [None if row is None else self._example_ids[row] for row in best]


class _Filter:
    """Tells hashes that may be in a table from those that are not, in one look-up each."""

    def __init__(self, table: np.ndarray) -> None:
        bits = min(max((16 * len(table)).bit_length(), 10), 26)
        self._shift = np.uint64(64 - bits)
        self._may = np.zeros(2**bits, bool)
        self._may[table >> self._shift] = True

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """Return the mask of those that may be in the table."""
        found: np.ndarray = self._may[(hashes >> self._shift).view(np.int64)]
        return found


@dataclass(frozen=True)
class _Words:
    """The words of some texts, by hash."""

    hashes: np.ndarray
    bounds: np.ndarray
    """Text i has the words bounds[i] to bounds[i + 1]."""

    def ngrams(self, n: int, may: _Filter | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return (hash, text) of all n-grams, or of those that a filter lets through.

        A text of fewer words than n gives one for the whole; a text without a word none.
        """
        powers, inverse = _powers()
        sums = np.zeros(len(self.hashes) + 1, np.uint64)
        np.cumsum(self.hashes * powers[: len(self.hashes)], out=sums[1:])
        count = max(0, len(self.hashes) - n + 1)
        hashes = (sums[n:] - sums[:count]) * inverse[:count] if count else sums[:0]
        starts = np.arange(count) if may is None else np.flatnonzero(may(hashes))
        owners = np.searchsorted(self.bounds, starts, "right") - 1
        inside = starts + n <= self.bounds[owners + 1]  # not across two texts
        starts, owners = starts[inside], owners[inside]
        wholes, short = self._wholes(sums, n)
        if may is not None:
            good = may(wholes)
            wholes, short = wholes[good], short[good]
        return np.concatenate([hashes[starts], wholes]), np.concatenate([owners, short])

    def _wholes(self, sums: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (hash, text) of the texts with fewer words than n; no n-gram has their hashes."""
        lengths = np.diff(self.bounds)
        short = np.flatnonzero((lengths > 0) & (lengths < n))
        starts, ends = self.bounds[short], self.bounds[short + 1]
        hashes = (sums[ends] - sums[starts]) * _powers()[1][starts]
        return _mixed(hashes + lengths[short].astype(np.uint64)), short


def _chunks(texts: Texts) -> Iterator[tuple[int, _Words]]:
    """Stream the words of some texts at a time, with the number of the first of them."""
    if not len(texts.pieces):
        return
    _, offset_buffer, data_buffer = texts.pieces.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[texts.pieces.offset :]
    offsets = offsets[: len(texts.pieces) + 1].astype(np.int64)
    if offsets[-1] == offsets[0]:
        return
    data = np.frombuffer(data_buffer, np.uint8)
    ends = offsets[texts.bounds]
    first, last = 0, len(ends) - 1
    while first < last:
        after = int(np.searchsorted(ends, ends[first] + CHUNK_BYTES, "right")) - 1
        after = min(max(after, first + 1), last)
        bounds = texts.bounds[first : after + 1]
        here = offsets[bounds[0] : bounds[-1] + 1]
        words, word_bounds = _words(data[here[0] : here[-1]], here - here[0])
        yield first, _Words(words, word_bounds[bounds - bounds[0]])
        first = after


def _words(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of the words of some UTF-8 strings, and where each string's begin.

    Args:
        bounds: string i has the bytes bounds[i] to bounds[i + 1].
    """
    if len(data) > MOST_BYTES:
        data, bounds = _cut(data, bounds)
    codes, flags, bounds = _characters(data, bounds)
    breaks = np.zeros(len(codes) + 2, bool)  # where a string begins
    breaks[bounds] = True
    _count_signs(flags, breaks)
    single, join = (flags & SINGLE) != 0, (flags & JOIN) != 0
    apart = np.ones(len(codes) + 1, bool)  # characters i - 1 and i are not of one word
    np.logical_not(join[1:] & join[:-1], out=apart[1:-1])
    apart |= breaks[:-1]
    word = join | single
    starts = np.flatnonzero(word & apart[:-1])
    ends = np.flatnonzero(word & apart[1:]) + 1
    powers, inverse = _powers()
    sums = np.zeros(len(codes) + 1, np.uint64)
    weights = _tables(_ASCII if codes.dtype == np.uint8 else _ALL).weights.take(codes, mode="clip")
    np.cumsum(weights * powers[: len(codes)], out=sums[1:])
    hashes = _mixed((sums[ends] - sums[starts]) * inverse[starts])
    return hashes, np.searchsorted(starts, bounds)


def _cut(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `MOST_BYTES` bytes, without a part of a character at their end."""
    end = MOST_BYTES
    while data[end] & 0xC0 == 0x80:
        end -= 1
    return data[:end], np.minimum(bounds, end)


def _characters(data: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the characters, their kinds and the bounds of strings, without those passed over."""
    if not len(data) or data.max() < _ASCII:
        return data, _tables(_ASCII).flags.take(data, mode="clip"), bounds
    text = data.tobytes().decode("utf-8", "surrogatepass")
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    bounds = _count_before((data & 0xC0) != 0x80)[bounds]
    codes = np.minimum(codes, _ALL - 1)
    flags = _tables(_ALL).flags.take(codes, mode="clip")
    dropped = (flags & DROP) != 0
    if dropped.any():
        kept = ~dropped
        codes, flags, bounds = codes[kept], flags[kept], _count_before(kept)[bounds]
    return codes, flags, bounds


def _count_before(mask: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(mask)])


def _count_signs(flags: np.ndarray, breaks: np.ndarray) -> None:
    """Mark the signs that a number follows, at once or after a space, as words of their own."""
    at = np.flatnonzero(flags & SIGN)
    if not len(at):
        return
    padded = np.append(flags, [0, 0]).astype(np.uint8)
    next_, after = padded[at + 1], padded[at + 2]
    by_space = ((next_ & SPACE) != 0) & ((after & DIGIT) != 0) & ~breaks[at + 2]
    follows = (((next_ & DIGIT) != 0) | by_space) & ~breaks[at + 1]
    flags[at[follows]] |= SINGLE


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Return hashes in which every bit depends on all (the end of SplitMix64)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = hashes ^ (hashes >> np.uint64(31))
    return mixed


@lru_cache(maxsize=1)
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Return the powers of the base and of its inverse modulo 2**64, for all places there are."""
    size = MOST_BYTES + 1
    both = []
    for base in (_BASE, _INVERSE):
        factors = np.full(size, base, np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors))
    return both[0], both[1]


class _Tables(NamedTuple):
    flags: np.ndarray
    weights: np.ndarray
    """A hash of what each character counts as."""


@lru_cache(maxsize=2)
def _tables(size: int) -> _Tables:
    """Return the kinds and the hashes of the first so many characters."""
    flags, folded = np.zeros(size, np.uint8), np.arange(size, dtype=np.uint64)
    for code in range(min(size, _RARE_HAN)):
        folded[code], flags[code] = character(chr(code))
    flags[_RARE_HAN : _ALL - 2] = SINGLE
    return _Tables(flags, _mixed(folded + np.uint64(_BASE)))


def character(char: str) -> tuple[int, int]:
    """Return the code that a character counts as (without case and accents), and its kinds."""
    if ord(char) >= _RARE_HAN:
        return ord(char), SINGLE if ord(char) < _ALL - 2 else 0
    if _is_in(char, _ACCENTS) or unicodedata.category(char) == "Cf":
        return ord(char), DROP
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    bases = [c for c in plain if not _is_in(c, _ACCENTS)]
    lower = char.lower()
    base = bases[0] if len(bases) == 1 else lower if len(lower) == 1 else char
    base = SIGNS.get(base, base)
    if base in SIGNS:
        return ord(base), SIGN
    if base == " ":
        return ord(base), SPACE
    if unicodedata.category(base)[0] not in "LMN":
        return ord(base), 0
    if _is_in(base, _UNSPACED):
        return ord(base), SINGLE
    return ord(base), JOIN | (DIGIT if unicodedata.category(base) == "Nd" else 0)


def _is_in(char: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= ord(char) <= high for low, high in ranges)


def _distinct(left: np.ndarray, right: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct pairs, sorted; `right` is below `size`."""
    both = np.unique(left * max(1, size) + right)
    return both // max(1, size), both % max(1, size)
