"""Rows of pairs: from tables of samples to what `pairing` judges, and from its verdict to tables.

Shapes: S samples, R responses (the samples, then one human response a prompt where it is chosen).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.config import PairConfig
from stages.data.chat import Renderer, RowRefusedError
from stages.data.columns import list_column
from stages.data.draw import NUMBERS, drawn_number
from stages.data.pairing import (
    Candidates,
    Floats,
    Ints,
    Responses,
    Verdict,
    Words,
    rank_among,
    repeats,
)
from stages.data.rows import DROPPED, PAIRS


@dataclass(frozen=True)
class Sides:
    """All responses to some prompts, as columns."""

    prompt_id_S: pa.Array
    prompt_tokens_S: pa.ListArray
    text_R: pa.Array
    tokens_R: pa.ListArray
    source_R: pa.Array
    refusals: Mapping[int, str]
    """What the renderer says of the human responses that it refused, by number of the response."""

    @classmethod
    def of(cls, samples: pa.Table, human: pa.Array | None, renderer: Renderer | None) -> "Sides":
        """Return the samples' columns, with those of human responses where there are any.

        Args:
            samples: rows of GENERATIONS, with a column `source`.
            human: texts, one a prompt.
        """
        columns = ("response", "response_token_ids", "source")
        parts = [[samples[name].combine_chunks() for name in columns]]
        refusals: dict[int, str] = {}
        if human is not None:
            assert renderer is not None, "human responses are tokenized by the renderer"
            tokens = renderer.responses_tokens(human.to_pylist())
            for number, found in enumerate(tokens, samples.num_rows):
                if isinstance(found, RowRefusedError):
                    refusals[number] = str(found)
            lists = [[] if isinstance(found, RowRefusedError) else found for found in tokens]
            sources = pa.array(["human"] * len(human), pa.string())
            parts.append([human, list_column(lists, pa.int32()), sources])
        texts, ids, sources = (pa.concat_arrays(column) for column in zip(*parts, strict=True))
        prompt_id, prompt_tokens = (
            samples[name].combine_chunks() for name in ("prompt_id", "prompt_token_ids")
        )
        return cls(prompt_id, prompt_tokens, texts, ids, sources, refusals)

    def responses(
        self, samples: pa.Table, prompt_S: Ints, reward_S: Floats, draw_S: Any
    ) -> Responses:
        """Return what decides of the pairs."""
        num_human = len(self.text_R) - samples.num_rows
        refused = np.full(len(self.text_R), "", object)
        for number, why in self.refusals.items():
            refused[number] = why.partition(": ")[0]

        def with_human(values_S: Any, value: Any) -> Any:
            return np.append(values_S, np.full(num_human, value, values_S.dtype))

        is_cut_off_S = pc.equal(samples["finish_reason"], "length").to_numpy()
        return Responses(
            num_samples=samples.num_rows,
            prompt_R=np.append(prompt_S, np.arange(num_human)),
            index_R=with_human(samples["sample_index"].to_numpy().astype(np.int64), -1),
            tokens_R=_lengths(self.tokens_R),
            prompt_tokens_R=with_human(_lengths(self.prompt_tokens_S), 0),
            text_R=_codes(self.text_R),
            ids_R=_codes(_as_bytes(self.tokens_R)),
            empty_R=_bools(pc.equal(pc.utf8_trim_whitespace(self.text_R), "")),
            cut_off_R=with_human(is_cut_off_S, value=False),
            refused_R=refused,
            reward_R=with_human(reward_S, np.nan),
            draw_R=with_human(draw_S, 0),
        )

    def pairs(
        self, responses: Responses, found: Candidates, verdict: Verdict, iteration: int
    ) -> pa.Table:
        """Return rows of PAIRS."""
        [made] = np.nonzero(verdict.reason_C == "")
        chosen, rejected = found.chosen_C[made], found.rejected_C[made]
        w, l = pa.array(chosen), pa.array(rejected)  # noqa: E741
        prompt = responses.prompt_R[rejected]
        columns = {
            "prompt_id": self.prompt_id_S.take(l),
            "pair_index": rank_among(prompt, np.ones(len(made), bool)).astype(np.int32),
            "prompt_token_ids": self.prompt_tokens_S.take(l),
            "chosen_token_ids": self.tokens_R.take(w),
            "rejected_token_ids": self.tokens_R.take(l),
            "chosen": self.text_R.take(w),
            "rejected": self.text_R.take(l),
            "chosen_source": self.source_R.take(w),
            "rejected_source": self.source_R.take(l),
            "chosen_reward": _or_null(responses.reward_R[chosen]),
            "rejected_reward": _or_null(responses.reward_R[rejected]),
            "win_probability": _or_null(verdict.win_probability_C[made]),
            "iteration": np.full(len(made), iteration, np.int32),
            "weight": np.ones(len(made)),
        }
        return pa.table(columns, schema=PAIRS)

    def dropped(self, responses: Responses, found: Candidates, verdict: Verdict) -> pa.Table:
        """Return rows of DROPPED."""
        [out] = np.nonzero(verdict.reason_C != "")
        chosen, rejected = found.chosen_C[out], found.rejected_C[out]
        detail = pc.if_else(
            pa.array(found.lone_C[out] == ""),
            pc.binary_join_element_wise(
                self._described(responses, chosen),
                self._described(responses, rejected),
                " against ",
            ),
            self._described(responses, rejected),
        )
        if self.refusals:
            texts = detail.to_pylist()
            for place, number in enumerate(chosen.tolist()):
                if number in self.refusals:
                    texts[place] = f"human: {self.refusals[number].partition(': ')[2]}"
            detail = pa.array(texts, pa.string())
        columns = {
            "prompt_id": self.prompt_id_S.take(pa.array(rejected)),
            "reason": pa.array(verdict.reason_C[out], pa.string()),
            "detail": detail,
        }
        return pa.table(columns, schema=DROPPED)

    def _described(self, responses: Responses, numbers: Ints) -> pa.Array:
        """Return texts such as `sample 3 (17 tokens, reward 0.5)`."""
        source = self.source_R.take(pa.array(numbers))
        tokens = pa.array(responses.tokens_R[numbers]).cast(pa.string())
        reward = _or_null(responses.reward_R[numbers]).cast(pa.string())
        with_reward = pc.binary_join_element_wise(", reward ", reward, "")
        return pc.binary_join_element_wise(
            source, " (", tokens, " tokens", pc.fill_null(with_reward, ""), ")", ""
        )


@dataclass(frozen=True)
class Replay:
    """How pairs of earlier iterations are added to an iteration's own."""

    config: PairConfig
    seed: int
    iteration: int

    def add(self, own: pa.Table, earlier: Sequence[pa.Table]) -> tuple[pa.Table, pa.Table, int]:
        """Return rows of PAIRS and of DROPPED, and how many earlier pairs there were.

        Args:
            own: the iteration's pairs.
            earlier: those of the iterations before, own pairs of each alone, the newest first:
                of equal pairs the first one stays.
        """
        rows = pa.concat_tables([own, *earlier]).combine_chunks()
        reason_N = self._reasons(rows)
        back_N = self.iteration - rows["iteration"].to_numpy()
        weight_N = self.config.replay.weight ** back_N.astype(np.float64)
        rows = rows.set_column(rows.schema.names.index("weight"), PAIRS.field("weight"), [weight_N])
        kept = rows.filter(pa.array(reason_N == ""))
        order = [
            ("prompt_id", "ascending"),
            ("iteration", "descending"),
            ("pair_index", "ascending"),
        ]
        kept = kept.take(pc.sort_indices(kept, sort_keys=order))
        prompt_N = _codes(kept["prompt_id"].combine_chunks())
        index_N = rank_among(prompt_N, np.ones(kept.num_rows, bool)).astype(np.int32)
        place = kept.schema.names.index("pair_index")
        kept = kept.set_column(place, PAIRS.field("pair_index"), [index_N])
        return kept, _not_replayed(rows, reason_N), rows.num_rows - own.num_rows

    def _reasons(self, rows: pa.Table) -> Words:
        is_replayed = rows["iteration"].to_numpy() != self.iteration
        lengths = {
            name: _lengths(rows[f"{name}_token_ids"].combine_chunks())
            for name in ("prompt", "chosen", "rejected")
        }
        longest = lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"])
        is_long = is_replayed & (longest > self.config.max_length)
        reason_N: Words = np.where(is_long, "replay_too_long", "").astype(object)
        reason_N[is_replayed & ~self._drawn(rows)] = "replay_share"
        both = pa.concat_arrays([rows[side].combine_chunks() for side in ("chosen", "rejected")])
        code = _codes(both)
        pair_N = code[: rows.num_rows] * (code.max(initial=0) + 1) + code[rows.num_rows :]
        prompt_N = _codes(rows["prompt_id"].combine_chunks())
        reason_N[repeats(prompt_N, pair_N, reason_N == "")] = "replay_duplicate"
        return reason_N

    def _drawn(self, rows: pa.Table) -> Any:
        """Tell which rows are in the share that is kept."""
        share = self.config.replay.share
        if share == 1:
            return np.ones(rows.num_rows, bool)
        columns = (rows[name].to_pylist() for name in ("iteration", "prompt_id", "pair_index"))
        draws = (
            drawn_number("replay", self.seed, self.iteration, *which)
            for which in zip(*columns, strict=True)
        )
        return np.array([drawn < share * NUMBERS for drawn in draws], bool)


def _not_replayed(rows: pa.Table, reason_N: Words) -> pa.Table:
    out = rows.filter(pa.array(reason_N != ""))
    detail = pc.binary_join_element_wise(
        "pair ",
        out["pair_index"].cast(pa.string()),
        " of iteration ",
        out["iteration"].cast(pa.string()),
        "",
    )
    reason = pa.array(reason_N[reason_N != ""], pa.string())
    columns = {"prompt_id": out["prompt_id"], "reason": reason, "detail": detail}
    return pa.table(columns, schema=DROPPED)


def _lengths(lists: pa.ListArray) -> Ints:
    lengths: Ints = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    return lengths


def _codes(values: pa.Array) -> Ints:
    """Return a number for each value, the same for equal ones."""
    codes: Ints = values.dictionary_encode().indices.to_numpy().astype(np.int64)
    return codes


def _as_bytes(lists: pa.ListArray) -> pa.Array:
    """Return lists of int32 as byte strings, without a copy of their values."""
    values = lists.values
    assert values.type == pa.int32() and not values.null_count
    offsets = (lists.offsets.to_numpy().astype(np.int64) + values.offset) * 4
    buffers = [None, pa.py_buffer(offsets), values.buffers()[1]]
    return pa.Array.from_buffers(pa.large_binary(), len(lists), buffers)


def _bools(values: pa.Array) -> Any:
    return values.to_numpy(zero_copy_only=False)


def _or_null(values: Floats) -> pa.Array:
    """Return a column in which NaN is null."""
    return pa.array(values, pa.float64(), from_pandas=True)
