"""Gates: when the player becomes champion, and what comes next if it does not."""

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from stages.config.fields import Count, NonNegative, Positive, Section

Rival = Literal["champion", "opponent", "start"]
Confidence = Annotated[float, Field(gt=0.5, le=0.999)]
"""The p values of a bootstrap end at 0.0005."""


OF_COMPARISON = ("heldout_", "opponent_", "sampled_gain")
"""How the names of metrics begin that an evaluation has of player and opponent together."""


class BetterConfig(Section):
    """The player is better than a rival on the same examples, with a stated confidence."""

    metric: str
    """A metric of evaluate, or SUITE.METRIC."""
    by: NonNegative = 0.0
    """Better by more than this."""
    confidence: Confidence = 0.95
    """One-sided."""
    against: Rival = "champion"
    lower: bool = False
    """Lower values are better."""


class NotWorseConfig(Section):
    """The player is not worse than a rival by more than a margin, with a stated confidence."""

    metric: str
    margin: Positive
    """In the metric's own unit: 0.01 is one point of an accuracy."""
    confidence: Confidence = 0.95
    against: Rival = "champion"
    lower: bool = False


class AtLeastConfig(Section):
    """The player's own value reaches a bound."""

    metric: str
    value: float
    confidence: Confidence | None = None
    """None: the value itself; otherwise its one-sided lower bound."""


LENGTH = "sampled_mean_tokens"
"""The only metric of evaluate that a human answer has in the same unit."""


class LengthWithinConfig(Section):
    """The mean length of the player's answers stays near a rival's."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """0.2 is at most 20% longer or shorter."""
    metric: str = LENGTH
    against: Literal["champion", "opponent", "start", "human"] = "opponent"

    @model_validator(mode="after")
    def _has_a_length(self) -> "LengthWithinConfig":
        if self.against == "human" and self.metric != LENGTH:
            raise ValueError(
                f"of the human answers nothing but the length is known, so that {self.metric} "
                f"cannot be against human; name a metric of evaluate that is theirs too ({LENGTH}, "
                "or leave it out), or another rival"
            )
        return self


class ConditionConfig(Section):
    """One condition of a gate: exactly one of the fields is set."""

    all: tuple["ConditionConfig", ...] | None = None
    any: tuple["ConditionConfig", ...] | None = None
    better: BetterConfig | None = None
    not_worse: NotWorseConfig | None = None
    at_least: AtLeastConfig | None = None
    length_within: LengthWithinConfig | None = None
    alarms_clear: Literal["refuse", "note"] | None = None
    """refuse: no alarm that refuses fired (which holds in any case); note: none at all."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_list(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            raise ValueError(
                "one condition is needed; several go into {all: [...]}, or {any: [...]} where one "
                "is enough"
            )
        return given

    @model_validator(mode="after")
    def _is_one(self) -> "ConditionConfig":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"a condition is one of {known}; this one has {given or 'none'}")
        if getattr(self, given[0]) == ():
            raise ValueError(f"`{given[0]}` holds no condition; add one, or leave it out")
        return self

    @model_serializer(mode="wrap")
    def _only_what_it_is(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """Return the whole condition."""
        return self.model_dump(mode="json")

    def metrics(self) -> list[str]:
        """Return the metrics that it and the conditions in it ask for."""
        own = [c.metric for c in (self.better, self.not_worse, self.at_least) if c is not None]
        own += [self.length_within.metric] if self.length_within else []
        return own + [m for c in (*(self.all or ()), *(self.any or ())) for m in c.metrics()]


class RetryConfig(Section):
    """After a refusal with `on_refusal: retry`: play again from the champion, more carefully."""

    times: Count = 2
    """How often in a row; the refusal after that stops the run."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What train.learning_rate is multiplied by, once for each refusal in a row."""


class PromoteConfig(Section):
    """When the player becomes champion."""

    metric: str = "heldout_reward_accuracy"
    """One of evaluate's metrics: the one that stands for the run in tables and in `stop`."""
    min_value: float | None = None
    """The metric must reach this value."""
    min_gain: float | None = None
    """The metric must exceed the champion's by at least this; before there is a champion, the
    start's, where it has the metric."""
    gate: ConditionConfig | None = None
    """Further conditions, on paired examples; see docs/gates.md."""
    on_refusal: Literal["stop", "retry", "champion", "player"] = "stop"
    """After a refusal: stop the run, retry from the champion with a lower learning rate, play on
    from the champion, or from the player anyway."""
    retry: RetryConfig = RetryConfig()

    def suites(self) -> list[str]:
        """Return the suites that the gate asks for."""
        asked: list[Any] = self.gate.metrics() if self.gate else []
        return sorted({metric.split(".")[0] for metric in asked if "." in metric})
