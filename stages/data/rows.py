"""The Arrow schemas of all rows on disk, each written once, here.

Every table is sorted by `prompt_id` (then by sample or pair index), so that tables are joined by
id in one streaming pass. A prompt id is a hash, so this order is also a stable shuffle.
"""

import pyarrow as pa

_TOKENS = pa.list_(pa.int32())
_MESSAGE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
    ]
)


def _schema(**columns: pa.DataType | tuple[pa.DataType, str]) -> pa.Schema:
    """Build a schema; a column given as (type, "optional") may be null."""
    fields = [
        pa.field(name, kind[0], nullable=True)
        if isinstance(kind, tuple)
        else pa.field(name, kind, nullable=False)
        for name, kind in columns.items()
    ]
    return pa.schema(fields)


PROMPTS = _schema(
    prompt_id=pa.string(),
    messages=pa.list_(_MESSAGE),
    response=pa.string(),
    source=pa.string(),
    source_row=pa.int64(),
)
"""A prompt as messages, and the human response to it."""

RENDERED = _schema(prompt_id=pa.string(), num_tokens=pa.int32(), prompt_token_ids=_TOKENS)
"""A prompt as tokens, and how many; only ever in scratch files."""

ANSWERS = _schema(
    request_id=pa.string(),
    token_ids=_TOKENS,
    token_logprobs=pa.list_(pa.float64()),
    finish_reason=pa.string(),
)
"""What an engine answered to a request of an evaluation; only ever in scratch files."""

GENERATIONS = _schema(
    prompt_id=pa.string(),
    sample_index=pa.int32(),
    seed=pa.int64(),
    prompt_token_ids=_TOKENS,
    response_token_ids=_TOKENS,
    response=pa.string(),
    finish_reason=pa.string(),
    token_logprobs=pa.list_(pa.float32()),
)
"""One sample. `response` is the text of the response tokens without the stop token."""

REWARDS = _schema(
    prompt_id=pa.string(),
    sample_index=pa.int32(),
    reward=pa.float64(),
)
"""The score of one sample."""

SCORES = _schema(
    prompt_id=pa.string(),
    sample_index=pa.int32(),
    reward=(pa.float64(), "optional"),
    reason=(pa.string(), "optional"),
    detail=(pa.string(), "optional"),
)
"""The score of one sample, or why there is none; only ever in scratch files."""

JUDGEMENTS = _schema(
    prompt_id=pa.string(),
    a=pa.int32(),
    b=pa.int32(),
    order=pa.string(),
    verdict=(pa.string(), "optional"),
    text=(pa.string(), "optional"),
)
"""What a judge said of two answers to a prompt, `a` and `b`: sample indexes (in evaluate 0 for the
sampled and 1 for the greedy answer), or -1 for the human response. `order` is `ab` or `ba`, as they
were shown, and `verdict` is `a`, `b` or `tie` whichever way; null where the reply, `text`, holds
none. Equal answers are a tie that nobody was asked about: `text` is null."""

DROPPED_FILE = "dropped.parquet"
"""Where stages keep rows of DROPPED."""
DROPPED = _schema(
    prompt_id=pa.string(),
    reason=pa.string(),
    detail=pa.string(),
)
"""A prompt or row that was left out, and why."""

CONTAMINATION = _schema(
    prompt_id=pa.string(),
    ngrams=pa.int32(),
    share_in_prompts=pa.float64(),
    share_in_responses=pa.float64(),
    example_prompt_id=(pa.string(), "optional"),
)
"""A held-out prompt: how many n-grams it was compared by (1 where it is short and was compared as a
whole), the shares of them that stand in training prompts and responses, and a training row with
some of them."""

_PAIR_COLUMNS: dict[str, pa.DataType | tuple[pa.DataType, str]] = {
    "prompt_id": pa.string(),
    "pair_index": pa.int32(),
    "prompt_token_ids": _TOKENS,
    "chosen_token_ids": _TOKENS,
    "rejected_token_ids": _TOKENS,
    "chosen": pa.string(),
    "rejected": pa.string(),
    "chosen_source": pa.string(),
    "rejected_source": pa.string(),
    "chosen_reward": (pa.float64(), "optional"),
    "rejected_reward": (pa.float64(), "optional"),
    "win_probability": (pa.float64(), "optional"),
    "iteration": pa.int32(),
    "weight": pa.float64(),
}
PAIRS = _schema(**_PAIR_COLUMNS)
"""A chosen and a rejected response to one prompt; a source is `human` or `sample N`. `iteration` is
that whose opponent gave the samples, `weight` the pair's in the loss: 1 for an iteration's own."""

SCORED_PAIRS = _schema(
    **_PAIR_COLUMNS,
    reference_chosen_logprob=pa.float64(),
    reference_rejected_logprob=pa.float64(),
)
"""Pairs with the summed log-probabilities of both responses under the reference."""

SUPERVISED = _schema(
    prompt_id=pa.string(),
    prompt_token_ids=_TOKENS,
    chosen_token_ids=_TOKENS,
    rejected_token_ids=_TOKENS,
)
"""Rows of supervised training: as pairs, with no rejected response."""

TRAIN_METRICS = _schema(
    step=pa.int32(),
    epoch=pa.float64(),
    learning_rate=pa.float64(),
    loss=pa.float64(),
    accuracy=pa.float64(),
    margin=pa.float64(),
    chosen_logratio=pa.float64(),
    rejected_logratio=pa.float64(),
    chosen_logprob=pa.float64(),
    rejected_logprob=pa.float64(),
    chosen_logprob_per_token=pa.float64(),
    grad_norm=pa.float64(),
    pairs=pa.int32(),
    tokens=pa.int64(),
)
"""One optimizer step of train: `loss` is the mean over the global batch by the pairs' weights, the
metrics are plain means over its pairs; `margin` is β times the difference of the two log-ratios,
and `grad_norm` is taken before clipping. `chosen_logprob_per_token` is the mean of each response's
own mean."""

SFT_METRICS = _schema(
    step=pa.int32(),
    epoch=pa.float64(),
    learning_rate=pa.float64(),
    loss=pa.float64(),
    grad_norm=pa.float64(),
    rows=pa.int32(),
    tokens=pa.int64(),
)
"""One optimizer step of sft; `loss` is the mean negative log-likelihood a response token."""

TIMINGS = _schema(
    step=pa.int32(),
    seconds=pa.float64(),
    tokens_per_s=pa.float64(),
)
"""Wall time of the steps; a volatile file, kept apart so that all else can be compared by hash."""

EXAMPLES = _schema(
    prompt_id=pa.string(),
    human=pa.string(),
    sampled=pa.string(),
    sampled_seed=pa.int64(),
    sampled_finish_reason=pa.string(),
    sampled_token_ids=_TOKENS,
    sampled_logprob=pa.float64(),
    sampled_reward=(pa.float64(), "optional"),
    greedy=(pa.string(), "optional"),
    greedy_finish_reason=(pa.string(), "optional"),
    greedy_reward=(pa.float64(), "optional"),
    human_logprob=pa.float64(),
    human_token_ids=_TOKENS,
    opponent_human_logprob=(pa.float64(), "optional"),
    opponent_sample=(pa.string(), "optional"),
    opponent_sample_token_ids=(_TOKENS, "optional"),
    opponent_sample_finish_reason=(pa.string(), "optional"),
    opponent_sample_reward=(pa.float64(), "optional"),
    opponent_sample_logprob=(pa.float64(), "optional"),
    player_opponent_sample_logprob=(pa.float64(), "optional"),
    human_margin=(pa.float64(), "optional"),
    opponent_margin=(pa.float64(), "optional"),
)
"""One held-out prompt under the player. `human_margin` and `opponent_margin` are the implicit
rewards β(log π_player − log π_opponent) of the human response and of the opponent's own sample.
A log-probability is that of a whole response: `sampled_logprob` the player's of its own sample, by
its engine; the others by the trainer's forward: `human_logprob` and
`player_opponent_sample_logprob` the player's, `opponent_human_logprob` and
`opponent_sample_logprob` the opponent's."""

MEASURES = _schema(
    example_id=pa.string(),
    metric=pa.string(),
    value=pa.float64(),
    weight=pa.float64(),
)
"""What one metric of an evaluation is for one example. The metric is the weighted mean; an id and a
metric stand in one row at most, and ids are equal where two models were asked the same."""

SUITE_EXAMPLES = _schema(
    prompt_id=pa.string(),
    task=pa.string(),
    sample=pa.int32(),
    prompt=(pa.string(), "optional"),
    human=(pa.string(), "optional"),
    response=(pa.string(), "optional"),
    response_tokens=(pa.int32(), "optional"),
    finish_reason=(pa.string(), "optional"),
    seed=(pa.int64(), "optional"),
    score=(pa.float64(), "optional"),
    scored_by=(pa.string(), "optional"),
    other=(pa.string(), "optional"),
)
"""One answer in a suite. `task` is the suite's name, or that of a task within it; `sample` counts
the samples to a prompt from 0, and is -1 for the greedy answer. `scored_by` says what `score` is
(a reward, or a metric of the task), `other` is what a response was compared with. A score that is
missing has a row in unscored.parquet."""
