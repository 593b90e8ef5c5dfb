"""The typed schema of a recipe: the only home of defaults; see recipe.py for how it is filled.

Fields marked `identity=False` name a place or change speed, not the result: they stay out of keys.
"""

from typing import Any

from pydantic import Field, model_validator

from stages.config.fields import JUDGE_FIELDS, Count, Section, place
from stages.config.gates import (
    OF_COMPARISON,
    AtLeastConfig,
    BetterConfig,
    ConditionConfig,
    LengthWithinConfig,
    NotWorseConfig,
    PromoteConfig,
    RetryConfig,
)
from stages.config.sections import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    OF_VLLM,
    AdaptConfig,
    AlarmConfig,
    AlarmsConfig,
    ArchitectureConfig,
    ChatConfig,
    ContaminationConfig,
    EngineConfig,
    EvaluateConfig,
    ExactRewardConfig,
    ForwardConfig,
    GenerateConfig,
    JudgeRewardConfig,
    LoraConfig,
    ModelConfig,
    ModelRewardConfig,
    OptimConfig,
    PairConfig,
    ParallelConfig,
    ParityConfig,
    PrepareConfig,
    ReferenceConfig,
    RewardConfig,
    SamplingConfig,
    ScoreConfig,
    SftConfig,
    ShardingConfig,
    StopConfig,
    TrackingConfig,
    TrainConfig,
    has_temperature,
)
from stages.config.suites import (
    AlpacaEvalSuiteConfig,
    LmEvalSuiteConfig,
    MtBenchSuiteConfig,
    Suite,
    Suites,
    TaskSuiteConfig,
    WinRateSuiteConfig,
    suite_kinds,
)
from stages.errors import ConfigError

__all__ = [
    "HIGHEST_TEMPERATURE",
    "JUDGE_FIELDS",
    "LOWEST_TEMPERATURE",
    "OF_COMPARISON",
    "OF_VLLM",
    "AdaptConfig",
    "AlarmConfig",
    "AlarmsConfig",
    "AlpacaEvalSuiteConfig",
    "ArchitectureConfig",
    "AtLeastConfig",
    "BetterConfig",
    "ChatConfig",
    "ConditionConfig",
    "ContaminationConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExactRewardConfig",
    "ForwardConfig",
    "GenerateConfig",
    "JudgeRewardConfig",
    "LengthWithinConfig",
    "LmEvalSuiteConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelRewardConfig",
    "MtBenchSuiteConfig",
    "NotWorseConfig",
    "OptimConfig",
    "PairConfig",
    "ParallelConfig",
    "ParityConfig",
    "PrepareConfig",
    "PromoteConfig",
    "ReferenceConfig",
    "RetryConfig",
    "RewardConfig",
    "RunConfig",
    "SamplingConfig",
    "ScoreConfig",
    "SftConfig",
    "ShardingConfig",
    "StopConfig",
    "Suite",
    "Suites",
    "TaskSuiteConfig",
    "TrackingConfig",
    "TrainConfig",
    "WinRateSuiteConfig",
    "has_temperature",
    "suite_kinds",
    "suite_of",
]


class RunConfig(Section):
    """A recipe, resolved for one iteration."""

    name: str = "run"
    seed: int = Field(0, ge=0)
    verify: bool = place(True)
    """Check the SHA-256 of inputs before their first use."""
    threads: Count | None = place(None)
    """CPU threads of torch; None leaves torch's own choice."""
    model: ModelConfig = ModelConfig()
    chat: ChatConfig = ChatConfig()
    prepare: PrepareConfig = PrepareConfig()
    sft: SftConfig | None = None
    """None: the game starts from `model` itself."""
    generate: GenerateConfig = GenerateConfig()
    reward: RewardConfig = RewardConfig()
    pair: PairConfig = PairConfig()
    reference: ReferenceConfig = ReferenceConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    adapt: AdaptConfig = AdaptConfig()
    stop: StopConfig = StopConfig()
    tracking: TrackingConfig = place(TrackingConfig())
    suites: Suites = Field(default_factory=dict)
    """Further evaluations, by name."""

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide what a run makes."""
        suites = {name: suite.in_run() for name, suite in self.suites.items()}
        return super().identity() | {"suites": suites}

    @model_validator(mode="after")
    def _vllm_has_the_temperature(self) -> "RunConfig":
        sections: dict[str, Any] = {"generate": self.generate, "evaluate": self.evaluate}
        for name, suite in self.suites.items():
            if isinstance(suite, SamplingConfig):
                sections[f"suites.{name}"] = suite
        for name, section in sections.items():
            is_generate = name == "generate"
            engine = section.engine if is_generate else self.answering_engine(section.engine)
            if engine.name != "transformers" and not has_temperature(section.temperature):
                raise ValueError(
                    f"{name}.temperature={section.temperature}: vLLM has 0 (greedy) and "
                    f"{LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}; change it, or set "
                    f"{name}.engine.name=transformers"
                )
        return self

    def answering_engine(self, own: EngineConfig | None = None) -> EngineConfig:
        """Return the engine that an evaluation asks with: its own, or else evaluate's."""
        return own or self.evaluate.engine or self.generate.engine

    def suites_after(self, iteration: int | None) -> dict[str, Suite]:
        """Return the suites whose turn it is after an iteration; None: before the first, all."""
        turn = 0 if iteration is None else iteration + 1
        return {name: suite for name, suite in self.suites.items() if turn % suite.every == 0}

    @model_validator(mode="after")
    def _gates_ask_known_suites(self) -> "RunConfig":
        for name in self.promote.suites():
            suite = self.suites.get(name)
            if suite is None:
                raise ValueError(
                    f"promote.gate asks for {name}.…, but there is no suite {name!r}; add it to "
                    f"`suites` ({', '.join(self.suites) or 'which is empty'})"
                )
            if suite.every != 1:
                raise ValueError(
                    f"promote.gate asks for {name}.…, which is not evaluated in each iteration "
                    f"(suites.{name}.every={suite.every}); set it to 1"
                )
        return self

    @model_validator(mode="after")
    def _ranking_needs_rewards(self) -> "RunConfig":
        policy, least = self.pair.policy, 1 if self.pair.policy == "human_vs_worst" else 2
        if self.pair.needs_rewards and (
            self.reward.name == "none" or self.generate.num_samples < least
        ):
            raise ValueError(
                f"pair.policy={policy} needs reward.name to be set and "
                f"generate.num_samples >= {least}; they are {self.reward.name} and "
                f"{self.generate.num_samples}"
            )
        return self

    @model_validator(mode="after")
    def _sppo_is_told_probabilities(self) -> "RunConfig":
        if self.train.loss == "sppo" and self.pair.win_probability == "none":
            raise ValueError(
                "train.loss=sppo needs to know how surely chosen beats rejected; set "
                "pair.win_probability (one for human responses; see docs/pairing.md)"
            )
        return self

    @model_validator(mode="after")
    def _drawn_one_way(self) -> "RunConfig":
        if self.generate.max_prompts is not None and self.generate.prompt_share is not None:
            raise ValueError(
                "generate.max_prompts and generate.prompt_share exclude each other; set one"
            )
        if self.generate.draw == "slices" and self.generate.draws_all:
            raise ValueError(
                "generate.draw=slices takes a part of the prompts each iteration; set how many by "
                "generate.max_prompts or generate.prompt_share, or leave draw out"
            )
        return self

    @model_validator(mode="after")
    def _divergence_can_be_measured(self) -> "RunConfig":
        drawn = self.evaluate
        plainly = (drawn.temperature, drawn.top_p, drawn.top_k) == (1.0, 1.0, 0)
        if self.adapt.target_kl is not None and not plainly:
            raise ValueError(
                "adapt.target_kl needs evaluate.temperature=1, top_p=1 and top_k=0: of samples "
                "drawn in another way no divergence can be told"
            )
        return self

    @model_validator(mode="after")
    def _carried_schedules_are_constant(self) -> "RunConfig":
        if self.train.carry_optimizer and self.train.schedule != "constant":
            raise ValueError(
                "train.carry_optimizer runs one schedule over all iterations, whose number is "
                "open; set train.schedule=constant (with train.warmup_steps=N)"
            )
        if self.train.carry_optimizer and self.train.warmup_steps is None:
            raise ValueError(
                "train.carry_optimizer counts steps over all iterations, whose number is open, so "
                "that warmup_ratio is a share of nothing; set train.warmup_steps=N (0 for none)"
            )
        return self


def suite_of(config: RunConfig, name: str) -> Suite:
    """Return a suite of a recipe.

    Raises:
        ConfigError: it has none of that name.
    """
    suite = config.suites.get(name)
    if suite is None:
        raise ConfigError(
            f"--suite {name}: recipe {config.name} has no such suite; it has "
            f"{', '.join(config.suites) or 'none'} (see `suites` in docs/evaluation.md)"
        )
    return suite
