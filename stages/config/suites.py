"""Suites: named evaluations beside the run's own; see docs/evaluation.md."""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, JsonValue, model_validator

from stages.config.fields import Count, Section, place
from stages.config.sections import EngineConfig, PrepareConfig, RewardConfig, SamplingConfig

LEADERBOARD = "open_llm_leaderboard_v1"
"""Stands for six of lm-evaluation-harness's tasks."""
TASK_FILES = (".yaml", ".yml", ".py", ".json")
_ARGUMENTS = frozenset(
    {"add_bos_token", "chat_template_args", "enable_thinking", "max_length", "prefix_token_id",
     "think_end_token"}
)  # fmt: skip
LM_EVAL_ARGUMENTS = {
    "transformers": _ARGUMENTS
    | {"attn_implementation", "device", "device_map", "load_in_4bit", "load_in_8bit",
       "logits_cache", "max_cpu_memory", "max_memory_per_gpu", "mixed_precision_dtype",
       "parallelize", "softmax_dtype", "tp_plan", "truncation"},
    "vllm": _ARGUMENTS
    | {"cpu_offload_gb", "data_parallel_size", "enable_chunked_prefill", "enable_prefix_caching",
       "enforce_eager", "gpu_memory_utilization", "kv_cache_dtype", "kv_cache_memory_bytes",
       "max_gen_toks", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "quantization",
       "tensor_parallel_size", "truncation_side"},
}  # fmt: skip
"""Arguments of lm-evaluation-harness's model classes that name no file, no model and no code."""
OF_WINS = (
    "win_rate", "length_controlled_win_rate", "tie_share", "identical_share", "mean_characters",
    "other_mean_characters",
)  # fmt: skip
"""What is measured where one answer was preferred to another, whoever preferred it."""
MAIN_EVALUATION = "evaluate"
"""What the run's own evaluation is called beside its suites."""
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


class _Suite(Section):
    every: Count = place(1)
    """`spin run` asks this suite after so many iterations (and before the first)."""

    def in_run(self) -> dict[str, Any]:
        """Return what decides what a run makes of it: further what enters keys by inputs alone."""
        return self.identity() | {"every": self.every}


class TaskSuiteConfig(_Suite, SamplingConfig):
    """Prompts answered and scored by a reward: accuracy, pass@k, majority@k."""

    kind: Literal["task"]
    data: PrepareConfig | None = place(None)
    """Prompts of its own, all of which are asked; None: the run's held-out prompts."""
    reward: RewardConfig | None = None
    """None takes the run's."""
    num_samples: int = Field(1, ge=0, le=1000)
    """Samples a prompt; 0 answers only greedily."""
    greedy: bool = True
    k: tuple[Count, ...] = ()
    """pass@k and majority@k are told for each of these; none above num_samples."""
    pass_reward: float = 1.0
    """A response passes at this reward or more."""
    max_prompts: Count | None = None
    """Ask only this many, drawn by hash."""
    engine: EngineConfig | None = None
    """None takes evaluate's."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> "TaskSuiteConfig":
        above = [k for k in self.k if k > self.num_samples]
        if above:
            raise ValueError(
                f"k={above[0]} is above num_samples={self.num_samples}; draw more, or leave it out"
            )
        if not self.num_samples and not self.greedy:
            raise ValueError("num_samples=0 and greedy=false answer nothing; set one of them")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"temperature=0 draws the same answer num_samples={self.num_samples} times; raise "
                "the temperature, or set num_samples=0 (greedy answers alone)"
            )
        return self

    def in_run(self) -> dict[str, Any]:
        """Return further how its own prompts are prepared, wherever they come from."""
        return super().in_run() | {"data": self.data and self.data.identity()}

    def prepares(self) -> PrepareConfig | None:
        """Return how its own prompts are prepared: none are held out, since all are asked."""
        return self.data and self.data.model_copy(update={"heldout_size": 0})


class LmEvalSuiteConfig(_Suite):
    """Tasks of lm-evaluation-harness, asked by that library itself."""

    kind: Literal["lm_eval"]
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of its tasks or groups, or open_llm_leaderboard_v1 (six tasks with their few-shot
    settings)."""
    task_dir: str | None = place(None)
    """A folder with task files of your own. They can run code: name only what you trust."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; None: as each task says."""
    limit: Count | None = None
    """Only the first so many questions of each task."""
    backend: Literal["transformers", "vllm"] = "transformers"
    batch_size: Count = place(8)
    """Of transformers; vLLM decides for itself."""
    apply_chat_template: bool = False
    seed: int = Field(1234, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: as the library decides, which is by the model's own."""
    model_args: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of the library's model class; none that names files or code."""

    @model_validator(mode="after")
    def _names_are_no_paths(self) -> "LmEvalSuiteConfig":
        for name in self.tasks:
            if not name or name[0] in ".~" or set(name) & set("/\\*") or name.endswith(TASK_FILES):
                raise ValueError(
                    f"{name!r} is no name of a task; files of your own are reached by task_dir (a "
                    "folder), and named by the `task` in them"
                )
        if LEADERBOARD in self.tasks and self.num_fewshot is not None:
            raise ValueError(
                f"{LEADERBOARD} has few-shot settings of its own; leave num_fewshot out"
            )
        return self

    @model_validator(mode="after")
    def _arguments_are_harmless(self) -> "LmEvalSuiteConfig":
        for name, value in self.model_args.items():
            if name not in LM_EVAL_ARGUMENTS[self.backend]:
                raise ValueError(
                    f"model_args may not set {name!r}; there are "
                    f"{', '.join(sorted(LM_EVAL_ARGUMENTS[self.backend]))}"
                )
            if name == "attn_implementation" and value not in ATTENTIONS:
                # Another name is that of a program on the hub.
                raise ValueError(
                    f"attn_implementation={value!r}; choose one of {', '.join(ATTENTIONS)}"
                )
        return self


class WinRateSuiteConfig(_Suite):
    """Answers of a model against others to the same prompts, by a reward or a judge."""

    kind: Literal["win_rate"]
    against: Literal["human", "opponent", "champion", "start"] = place("opponent")
    """Whom `spin run` compares the player with; it enters keys by the answers themselves."""
    answers: Literal["sampled", "greedy"] = "sampled"
    """Which of an evaluation's answers are compared."""
    reward: RewardConfig | None = None
    """Who decides; None takes the run's."""
    swap: bool = True
    """A judge sees each pair in both orders, and the two verdicts are averaged."""
    max_prompts: Count | None = None

    def in_run(self) -> dict[str, Any]:
        """Return further whom it compares the player with."""
        return super().in_run() | {"against": self.against}

    def metrics(self, reward: RewardConfig) -> list[str]:
        """Return all that it measures; it is not asked before an iteration is trained.

        Args:
            reward: the run's.
        """
        is_judge = (self.reward or reward).name == "judge"
        if is_judge:
            return [*OF_WINS, "prompts", *(["position_flip_share"] if self.swap else [])]
        return [*OF_WINS, "prompts", "mean_reward", "other_mean_reward"]


class MtBenchSuiteConfig(_Suite, SamplingConfig):
    """MT-Bench's two-turn questions, answered for its judge, whose verdicts are read back."""

    kind: Literal["mt_bench"]
    questions: str | None = place(None)
    """A question.jsonl file."""
    max_new_tokens: Count = 1024
    temperature: Annotated[float, Field(ge=0)] = 0.7
    """For categories that FastChat's table of temperatures does not name."""
    engine: EngineConfig | None = None


class AlpacaEvalSuiteConfig(_Suite, SamplingConfig):
    """AlpacaEval's instructions, answered for its annotators, whose verdicts are read back."""

    kind: Literal["alpaca_eval"]
    instructions: str | None = place(None)
    """A JSON file with a list of {instruction, dataset}."""
    max_new_tokens: Count = 2048
    engine: EngineConfig | None = None


Suite = Annotated[
    TaskSuiteConfig
    | LmEvalSuiteConfig
    | WinRateSuiteConfig
    | MtBenchSuiteConfig
    | AlpacaEvalSuiteConfig,
    Field(discriminator="kind"),
]


def suite_kinds() -> dict[str, type[Section]]:
    """Return the section of every kind of suite, by its name."""
    kinds = get_args(get_args(Suite)[0])
    return {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in kinds}


def _check_names(suites: dict[str, Any]) -> dict[str, Any]:
    for name in suites:
        if not (name.isascii() and name.replace("-", "").replace("_", "").isalnum()):
            raise ValueError(f"{name!r} is no name of a suite; use letters, digits, - and _")
        if name == MAIN_EVALUATION:
            raise ValueError(
                f"{name!r} is the run's own evaluation and no name of a suite; give it another"
            )
    return suites


Suites = Annotated[dict[str, Suite], AfterValidator(_check_names)]
