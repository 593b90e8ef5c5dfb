"""The sections of a recipe, but for suites and gates."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator

from stages.config.fields import (
    SECRET,
    Count,
    ModuleNames,
    NonNegative,
    Positive,
    Section,
    Share,
    check_pattern,
    check_url,
    place,
    read_judge_template,
    read_template,
    template_identity,
)


class ModelConfig(Section):
    """The model that the game starts from."""

    path: str | None = place(None)
    """A folder, a model artifact, or a hub id; `recipe://x` is x beside the recipe file."""
    revision: str | None = place(None)
    """The commit of a hub model; it enters keys by the hashes of what was loaded."""


class ChatConfig(Section):
    """How messages become tokens; one renderer for every stage."""

    template: Annotated[str | None, BeforeValidator(read_template)] = None
    """A Jinja chat template, a file of one (`x.jinja`, `recipe://x.jinja`), or `plain` (see
    docs/data.md); None takes the tokenizer's own, and `plain` where it has none."""
    system: str | None = None
    """A system prompt put before every conversation that has none."""
    prompt_suffix: str = ""
    """Text added to the last user message."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result; of a template, its hash."""
        return super().identity() | template_identity(self.template)


class WordSumsConfig(Section):
    """The built-in miniature task; see stages/data/word_sums.py."""

    num_examples: Count = 5000
    style: Literal["careful", "mixed"] = "careful"
    seed: int = 0
    skip: int = Field(0, ge=0)
    """Examples of the seed's stream to leave out; slices of one stream share no prompt."""


class ContaminationConfig(Section):
    """The report of held-out prompts that stand in the training part; see docs/data.md."""

    ngram: int = Field(13, ge=0)
    """Words in a row that a held-out prompt and a training row have in common where one is in the
    other; a prompt of fewer words is compared as a whole. 0 makes no report."""
    warn_share: Share = place(0.05)
    """Warn when more than this share of the held-out prompts is contaminated."""


class PrepareConfig(Section):
    """Where prompts and human responses come from."""

    source: str | None = place(None)
    """A file or folder (JSON lines, Parquet, CSV), here or at a URL (`s3://…`), or a Hugging Face
    data set id."""
    format: Literal["messages", "prompt_response", "gsm8k", "word_sums"] = "messages"
    split: str = "train"
    """Of a Hugging Face data set."""
    subset: str | None = None
    """The configuration name of a Hugging Face data set."""
    revision: str | None = None
    """The commit of a Hugging Face data set."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    messages_column: str = "messages"
    strip_calculator: bool = True
    """Remove GSM8K's `<<…>>` calculator marks."""
    heldout_source: str | None = place(None)
    """A source of held-out rows of its own; None takes them from `source`."""
    heldout_split: str | None = None
    heldout_size: int = Field(500, ge=0)
    """Number of held-out prompts, drawn by hash from the source, or from `heldout_source`."""
    max_prompts: Count | None = None
    """Keep at most this many training prompts, drawn by hash; None keeps all."""
    contamination: ContaminationConfig = ContaminationConfig()
    """How held-out prompts are looked for in what is trained on."""
    word_sums: WordSumsConfig = WordSumsConfig()


class ForwardConfig(Section):
    """How rows go through a model when log-probabilities are computed."""

    attention: Literal["auto", "shared", "packed", "padded", "single"] = "auto"
    """`shared` computes a prompt once for both responses, `packed` only saves padding, `padded`
    is the usual way, `single` one sequence at a time; `auto` takes the fastest that is exact."""
    token_budget: Count = 8192
    """Tokens a forward pass holds when rows are packed; a longer row goes alone."""
    micro_batch_size: Count = 8
    """Rows a forward pass holds when rows are padded."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 weights and computes matrix products in bf16."""


class ShardingConfig(Section):
    """How several processes divide a model among them; one process has all of it."""

    group_size: Count | None = None
    """Processes that hold one copy of the model together; None: all of them. A number that
    divides them makes hybrid sharding: copies between groups, such as one a node."""
    reshard_after_forward: bool = True
    """Free a layer's gathered weights after its forward pass; false keeps them until backward,
    for less communication and more memory."""
    cpu_offload: bool = False
    """Keep weights and optimizer state in the CPU's memory between their uses."""


class CheckpointConfig(Section):
    """Checkpoints inside a training stage, from which a stage that was cut off goes on."""

    every_steps: Count | None = None
    """Optimizer steps between two checkpoints."""
    every_minutes: Positive | None = 15.0
    """Minutes between two checkpoints; with `every_steps`, whichever comes first."""
    keep: Count = 2
    """Checkpoints kept, the newest; all are deleted when the stage is done."""


class ParallelConfig(Section):
    """How many processes work, and on what."""

    processes: Count = place(1)
    """Processes that work together on this machine, one a GPU; `torchrun` and `accelerate
    launch` start them themselves."""
    device: Literal["auto", "cpu", "cuda"] = place("auto")
    """auto: the GPUs where there are any."""


class OptimConfig(ForwardConfig, ParallelConfig):
    """One pass of gradient descent; shared by sft and train."""

    optimizer: Literal["adamw", "rmsprop", "adamw_8bit_torchao", "adamw_8bit_bnb"] = "adamw"
    """The last two keep AdamW's moments in 8 bits, by torchao or by bitsandbytes."""
    learning_rate: Positive = 5e-7
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates; RMSprop takes the second as its smoothing constant."""
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Share = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: int | None = Field(None, ge=0)
    """Number of warm-up steps; set, it replaces `warmup_ratio`."""
    max_grad_norm: Positive = 1.0
    epochs: Positive = 1.0
    max_steps: Count | None = None
    """Optimizer steps; set, it replaces `epochs`."""
    batch_size: Count = 64
    """Rows an optimizer step, over all processes; what exceeds a forward pass is accumulated."""
    activation_checkpointing: Literal["none", "full", "selective"] = place("none")
    """`full` keeps only each layer's input and computes the rest again in the backward pass;
    `selective` keeps the outputs that cost most to compute."""
    compile: bool = place(False)
    """Compile each layer with torch.compile, for rows padded to a few lengths."""
    max_length: Count = 2048
    """Rows whose prompt and response have more tokens than this are dropped and counted."""
    weights_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the saved model; auto takes that of the model it starts from. Training itself keeps
    fp32 weights."""
    log_every: Count = place(10)
    """Steps between two readings of the metrics from a GPU, each of which waits for it."""
    sharding: ShardingConfig = place(ShardingConfig())
    checkpoint: CheckpointConfig = place(CheckpointConfig())


class ArchitectureConfig(Section):
    """The shape of a model that starts from random weights."""

    family: Literal["llama", "qwen2"] = "llama"
    num_layers: Count = 4
    hidden_size: Count = 128
    intermediate_size: Count = 336
    num_heads: Count = 4
    num_kv_heads: Count | None = None
    """None: as many as `num_heads`."""
    max_position_embeddings: Count = 1024
    tie_embeddings: bool = True
    vocab_size: Count = 512
    """Of the tokenizer that is trained on the data."""


class SftConfig(OptimConfig):
    """Supervised fine-tuning, to make a first opponent."""

    init: Literal["pretrained", "random"] = "pretrained"
    """`random` makes model and tokenizer anew from `architecture` and the data."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    max_examples: Count | None = None
    """Use only this many training rows, drawn by hash."""
    learning_rate: Positive = 2e-5


class SamplingConfig(Section):
    """How responses are drawn."""

    temperature: NonNegative = 1.0
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """0 keeps the whole vocabulary."""
    max_new_tokens: Count = 256


OF_VLLM = (
    "tensor_parallel_size", "gpu_memory_utilization", "enforce_eager", "quantization",
    "enable_prefix_caching", "max_num_seqs", "max_num_batched_tokens", "extra",
)  # fmt: skip
"""Engine keys that the transformers engine does not have."""
LOWEST_TEMPERATURE = 0.01  # vLLM raises lower ones to this, and says so only in its log
HIGHEST_TEMPERATURE = 2.0


def has_temperature(temperature: float) -> bool:
    """Tell whether vLLM draws at a temperature, and does not change it on its own."""
    return temperature == 0 or LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE


class EngineConfig(Section):
    """What answers prompts."""

    name: Literal["transformers", "vllm", "ray"] = "transformers"
    """ray: vLLM on the workers of a Ray cluster."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: Count = place(256)
    """Rows decoded together by the transformers engine; vLLM has max_num_seqs."""
    max_model_len: Count | None = None
    """Longest prompt and response together; None: the longest prompt plus max_new_tokens."""
    tensor_parallel_size: Count = 1
    """GPUs that hold one copy of the model together, by vLLM."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, json_schema_extra={"identity": False})
    """Share of each GPU's memory that vLLM takes."""
    enforce_eager: bool | None = place(None)
    """vLLM without compilation: starts sooner, slower on a GPU; None compiles on a GPU only."""
    quantization: str | None = None
    """vLLM's name of a method, such as fp8; None: as the model's own config says."""
    enable_prefix_caching: bool | None = place(None)
    """Compute what prompts begin with in common once; None leaves it to vLLM, which does so for
    every model that it can do it for: the samples of one prompt share it."""
    max_num_seqs: Count | None = place(None)
    """Rows decoded together by vLLM; None leaves it to vLLM."""
    max_num_batched_tokens: Count | None = place(None)
    """Tokens of one step of vLLM's, prompts and answers together; None leaves it to vLLM."""
    processes: Count = place(1)
    """Engines side by side on this machine, each on tensor_parallel_size GPUs of its own; on a
    CPU they share the cores. ray: workers in the cluster."""
    gpus: Count | None = place(None)
    """GPUs to use; set, it replaces `processes`: an engine for every tensor_parallel_size."""
    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """Further vLLM engine arguments by its own names, lists and maps too; checked by their types
    before the engine starts."""

    @model_validator(mode="after")
    def _refuse_what_the_engine_does_not_know(self) -> "EngineConfig":
        if self.name == "transformers":
            fields = EngineConfig.model_fields
            for name in OF_VLLM:
                if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                    raise ValueError(
                        f"{name} is vLLM's, and the engine is transformers; set name=vllm beside "
                        f"it, or leave {name} out"
                    )
        return self


class ParityConfig(Section):
    """The check that the engine ran the model that will be trained; see docs/generation.md.

    Its fields decide whether generate succeeds, and no row: they may be changed after a failure.
    """

    rows: int = Field(32, ge=0)
    """Answers whose log-probabilities the trainer's model computes again; 0 turns the check off."""
    mean_tolerance: Positive | None = None
    """Largest mean difference a token; None: 1e-4 in fp32 on a CPU, in bf16 by the model's own
    rounding; see docs/generation.md."""
    worst_tolerance: Positive | None = None
    """Largest difference of a token, one in a thousand left out; None: likewise."""


class PoolConfig(Section):
    """Older opponents that answer beside the newest one."""

    size: int = Field(0, ge=0)
    """How many of the opponents before this one there are in the pool, the newest of them."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the drawn prompts that the pool answers, divided evenly among its models, by hash of
    seed, iteration and prompt."""


class GenerateConfig(SamplingConfig):
    """The opponent answers every prompt."""

    num_samples: Count = 1
    """Samples a prompt."""
    max_prompts: Count | None = None
    """Answer only this many prompts an iteration; None answers all."""
    prompt_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Answer this share of the prompts, at least one; it and `max_prompts` exclude each other."""
    draw: Literal["independent", "slices"] = "independent"
    """Which prompts those are. `independent`: drawn anew each iteration; `slices`: iterations take
    slices of one shuffled order in turn, so that no prompt comes again before all have come; the
    number must then be the same in all iterations."""
    pool: PoolConfig = PoolConfig()
    """Older opponents that answer a share of the prompts."""
    shard_rows: Count | None = place(None)
    """Rows a shard: what a kill can cost at most, and what one worker takes at a time. None: a
    32nd of all, but 128 at least and 2,048 at most. What an attempt began with holds to its end."""
    join: bool = place(False)
    """Where another process is answering these prompts for the same place, help it."""
    show_samples_every_s: Positive | None = place(None)
    """Seconds between two answers that are shown while the engine works; None shows none."""
    engine: EngineConfig = EngineConfig()
    parity: ParityConfig = place(ParityConfig())
    """The check of the engine against the trainer's model."""

    @property
    def draws_all(self) -> bool:
        """Whether every iteration answers all prompts."""
        return self.max_prompts is None and self.prompt_share is None


class MathRewardConfig(Section):
    r"""1 where the answer in the last `\boxed{}` has the value of the human one, else 0."""

    human: Literal["boxed", "whole"] = "boxed"
    r"""Where the human answer stands: in its last `\boxed{}`, or it is the whole response."""
    limit_s: Positive = 2.0
    """Seconds of processor time that one comparison may take."""


class ExactRewardConfig(Section):
    """1 where the response is the human response, else 0."""

    strip: bool = True
    """Overlook white space around the text."""
    collapse_whitespace: bool = False
    """Take any white space within the text for one space."""
    ignore_case: bool = False


class RegexRewardConfig(Section):
    """1 where a regular expression is found, or finds what it finds in the human response."""

    pattern: Annotated[str, AfterValidator(check_pattern)] = ""
    """In Python's syntax; flags stand in it, such as `(?is)`."""
    compare: Literal["found", "human"] = "found"
    """`found`: 1 where the pattern is found. `human`: 1 where its last match in the response has
    the text that its last match in the human response has: of the first group, or of the whole
    match where there are no groups."""
    limit_s: Positive = 1.0
    """Seconds of processor time that one response may take."""


class PythonRewardConfig(Section):
    """A function in a file of yours; see docs/rewards.md."""

    file: str | None = place(None)
    """The file; `recipe://x.py` is x.py beside the recipe. Its SHA-256 enters keys."""
    function: str = "reward"
    """Its name; called with a prompt's messages, a response and the human response."""
    timeout_s: Positive = 5.0
    """Seconds that one call may take."""


class ModelRewardConfig(Section):
    """A reward model: a sequence classifier with one label, whose logit is the reward."""

    path: str | None = place(None)
    """A folder or a hub id; `recipe://x` is x beside the recipe. Its hashes enter keys."""
    revision: str | None = place(None)
    """The commit of a hub model."""
    template: Annotated[str | None, BeforeValidator(read_template)] = None
    """A Jinja chat template, a file of one, or `plain`; None takes that of the model's own
    tokenizer."""
    engine: EngineConfig = EngineConfig()
    """transformers, or vLLM, in a process of its own; `max_model_len` is the longest conversation
    in tokens, None: as long as the model can take."""
    token_budget: Count = place(16384)
    """Tokens of one forward pass of transformers, padding included; engine.batch_size bounds its
    rows."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result; of a template, its hash."""
        return super().identity() | template_identity(self.template)


class JudgeRewardConfig(Section):
    """A language model that compares two answers, behind an OpenAI-compatible URL."""

    url: Annotated[str | None, AfterValidator(check_url)] = place(None)
    """Where the server is, such as http://localhost:8000/v1; `/chat/completions` is added."""
    model: str | None = None
    """The model's name on the server."""
    api_key_env: str | None = place(None)
    """Name of the environment variable that holds the key; the key itself is written nowhere."""
    against: Literal["samples", "human"] = "samples"
    """`samples`: a reward is the share of wins against the other samples of the prompt, or against
    the human response where a prompt has one sample; `human`: against the human response."""
    max_comparisons: Count | None = None
    """Pairs of samples compared for a prompt, each in both orders; drawn so that all samples have
    nearly equally many. None compares all."""
    template: Annotated[str | None, BeforeValidator(read_judge_template)] = None
    """What is asked, or a `.txt` file of it, with {prompt}, {answer_a}, {answer_b} and, if
    wanted, {human}; None takes ours. The last [[A]], [[B]] or [[tie]] of the reply is the
    verdict."""
    temperature: NonNegative = 0.0
    max_tokens: Count = 1024
    """Tokens of a reply."""
    seed: int = 0
    timeout_s: Positive = place(120.0)
    """Seconds that one reply may take."""
    retries: int = Field(5, ge=0, json_schema_extra={"identity": False})
    """How often a request is sent again where the server is busy, fails or cannot be reached."""
    concurrency: Count = place(8)
    """Comparisons that are asked at a time."""

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result; of a template, its hash."""
        return super().identity() | template_identity(self.template)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> "JudgeRewardConfig":
        # Of the section, not of its field: an error of a field quotes the value.
        parts = urlsplit(self.url or "")
        if "@" in parts.netloc or SECRET.search(f"{parts.query}&{parts.fragment}"):
            raise ValueError(
                "url is written into the run and seems to hold a key or a password; put it into "
                "the variable that api_key_env names"
            )
        return self


RewardName = Literal["none", "gsm8k", "math", "exact", "regex", "python", "model", "judge"]


class RewardConfig(Section):
    """What scores a response; see docs/rewards.md."""

    name: RewardName = "none"
    r"""`gsm8k`: the number after `####`; `math`: the value in `\boxed{}`; the others as their
    sections say."""
    on_error: Literal["quarantine", "stop"] = place("quarantine")
    """A response that cannot be scored is left out and counted, with its reason; or it stops the
    stage. It is never given a score."""
    processes: Count = place(1)
    """Processes that score rows side by side, for math, regex and python."""
    shard_prompts: Count | None = place(None)
    """Prompts whose scores are committed together, which is what a kill can cost at most. None:
    16 for a judge, 256 for a model, else 2,048."""
    math: MathRewardConfig = MathRewardConfig()
    exact: ExactRewardConfig = ExactRewardConfig()
    regex: RegexRewardConfig = RegexRewardConfig()
    python: PythonRewardConfig = PythonRewardConfig()
    model: ModelRewardConfig = ModelRewardConfig()
    judge: JudgeRewardConfig = JudgeRewardConfig()

    @property
    def is_a_share(self) -> bool:
        """Whether a mean of its scores is a share, of right answers or of wins.

        A function and a model score on scales of their own.
        """
        return self.name not in ("python", "model")

    def identity(self) -> dict[str, Any]:
        """Return the name, and what decides the result of the section of that name."""
        section = getattr(self, self.name, None)
        values: dict[str, Any] = {"name": self.name}
        return values | ({self.name: section.identity()} if isinstance(section, Section) else {})

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "RewardConfig":
        needed: dict[str, dict[str, str | None]] = {
            "regex": {"pattern": self.regex.pattern},
            "python": {"file": self.python.file},
            "model": {"path": self.model.path},
            "judge": {"url": self.judge.url, "model": self.judge.model},
        }
        for key, value in needed.get(self.name, {}).items():
            if not value:
                raise ValueError(f"reward.name={self.name} needs reward.{self.name}.{key}; set it")
        if self.name == "model" and self.model.engine.name == "ray":
            raise ValueError("reward.model.engine.name=ray: choose transformers or vllm")
        return self


class ReplayConfig(Section):
    """Pairs of earlier iterations that are trained on again, rescored under the new reference."""

    iterations: int = Field(0, ge=0)
    """How many iterations back pairs are taken from; 0 trains on the iteration's own alone."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Chance of each earlier pair to be kept, drawn by seed."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight in the loss of a pair from one iteration back; from n back it is weight**n."""


PairPolicy = Literal["human_vs_self", "human_vs_worst", "best_vs_worst", "best_vs_random", "random"]


class PairConfig(Section):
    """How a prompt gets its chosen and rejected response."""

    policy: PairPolicy = "human_vs_self"
    """`human_vs_self`: the human response against each sample (the paper). `human_vs_worst`:
    against the samples with the lowest rewards. `best_vs_worst`: the sample with the highest
    reward against those with the lowest (verl); `best_vs_random`: against others, drawn by seed;
    `random`: two samples drawn by seed, the one with the higher reward chosen."""
    max_pairs: Count | None = None
    """At most so many pairs a prompt, which is also how many are rejected by one chosen response;
    None: all of them in human_vs_self, one where rewards rank."""
    tie_policy: Literal["drop", "first"] = "drop"
    """Equal ranked rewards on both sides: drop the pair, or let the first sample win."""
    min_margin: NonNegative | None = None
    """Drop pairs whose ranked rewards differ by less than this."""
    max_margin: Positive | None = None
    """Drop pairs whose ranked rewards differ by more than this."""
    min_chosen_reward: float | None = None
    """Drop pairs whose chosen sample has a reward below this, before any length penalty."""
    max_rejected_reward: float | None = None
    """Drop pairs whose rejected sample has a reward above this, before any length penalty."""
    length_penalty: NonNegative = 0.0
    """Taken off a sample's reward for each of its tokens to give the ranked reward: what is
    ranked, and what ties, margins and win probabilities are made of. The columns chosen_reward
    and rejected_reward keep the reward as it was."""
    win_probability: Literal["none", "one", "bradley_terry", "win_rate"] = "none"
    """What the sppo loss is told of how surely chosen beats rejected: nothing; 1 (a human
    response); the logistic function of the ranked rewards' difference; or (1 + difference) / 2,
    at most 1, where rewards are win rates in 0..1, such as a judge's."""
    drop_cut_off: bool = True
    """Drop pairs with a response that was cut off at max_new_tokens."""
    max_length: Count = 2048
    """Longest prompt and response together, in tokens."""
    min_response_tokens: int = Field(0, ge=0)
    """Drop pairs with a response of fewer tokens than this, its end token included."""
    max_response_tokens: Count | None = None
    """Drop pairs with a response of more tokens than this."""
    max_length_ratio: Annotated[float, Field(ge=1)] | None = None
    """Drop pairs whose longer response has more than this times the tokens of the shorter."""
    replay: ReplayConfig = ReplayConfig()

    @property
    def needs_rewards(self) -> bool:
        """Whether samples are ranked by rewards."""
        return self.policy != "human_vs_self"

    @property
    def chooses_human(self) -> bool:
        """Whether the human response is the chosen one; it has no reward."""
        return self.policy in ("human_vs_self", "human_vs_worst")

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> "PairConfig":
        without = ["min_margin", "max_margin", "min_chosen_reward", "tie_policy"]
        if not self.needs_rewards:
            without += ["max_rejected_reward", "length_penalty"]
        for name in without if self.chooses_human else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"pair.{name} asks for rewards that pair.policy={self.policy} does not have; "
                    "leave it out, or take a policy that ranks samples"
                )
        if self.chooses_human and self.win_probability not in ("none", "one"):
            raise ValueError(
                f"pair.win_probability={self.win_probability} is made of two rewards, and a human "
                "response has none; set it to one, or take a policy that ranks samples"
            )
        return self

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> "PairConfig":
        for low, high in (
            ("min_margin", "max_margin"),
            ("min_response_tokens", "max_response_tokens"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"pair.{low}={least} is above pair.{high}={most}; swap them")
        return self


class ReferenceConfig(Section):
    """The model that the player is held to, and against which its rewards are measured."""

    policy: Literal["opponent", "first"] = "opponent"
    """`opponent`: that of the iteration in which the reference was last refreshed; `first`: the
    opponent of iteration 0 for ever."""
    update_every: Count = 1
    """Iterations between two refreshes: 1 takes each iteration's own opponent."""

    @model_validator(mode="after")
    def _first_is_never_refreshed(self) -> "ReferenceConfig":
        if self.policy == "first" and self.update_every != 1:
            raise ValueError(
                f"policy=first is never refreshed, so update_every={self.update_every} means "
                "nothing; leave it out, or take policy=opponent"
            )
        return self


class ScoreConfig(ForwardConfig, ParallelConfig):
    """Log-probabilities of pairs under the reference."""

    shard_rows: Count = place(2048)
    """Rows a shard: what a kill can cost at most, and what one process takes at a time."""


class LoraConfig(Section):
    """Low-rank adapters: a model's weights stay, and small additions B·A to them are trained."""

    rank: Count = 16
    """Of each addition."""
    alpha: Positive = 32.0
    """Additions are scaled by alpha / rank."""
    target_modules: ModuleNames = "all-linear"
    """Names of the linear maps that get one, such as [q_proj, v_proj]; `all-linear`: all but the
    head."""
    start: Literal["merged", "adapter"] = "merged"
    """`merged`: a fresh adapter on the opponent, with an adapter of its own merged; `adapter`: the
    opponent's own adapter is trained on, so the opponent must be one, of the same rank, alpha
    and target_modules."""
    output: Literal["merged", "adapter"] = "merged"
    """`merged`: a whole model, like any other; `adapter`: only the adapter, in fp32, and where
    its base is found."""


class TrainConfig(OptimConfig):
    """The player learns to prefer the chosen responses."""

    beta: Positive = 0.1
    """Strength of the pull towards the opponent."""
    loss: Literal["sigmoid", "hinge", "ipo", "exponential", "correlation", "sppo"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    length_normalized: bool = False
    """IPO with log-probabilities divided by their lengths."""
    reference_free: bool = False
    nll_weight: NonNegative = 0.0
    """Weight of the chosen response's mean negative log-likelihood a token (RPO)."""
    carry_optimizer: bool = False
    """Go on with the optimizer's state and step count of the player before, instead of anew, and
    keep them for the next. The schedule then runs over all iterations, so it must be constant,
    and its warm-up a number of steps."""
    control: bool = False
    """Train the control arm instead: supervised steps on the chosen responses, same number."""
    lora: LoraConfig | None = None
    """Train low-rank adapters, which takes far less memory; None trains all weights."""


class EvaluateConfig(SamplingConfig, ForwardConfig):
    """The player on held-out prompts."""

    max_prompts: Count | None = None
    """Use only this many held-out prompts, drawn by hash; None uses all."""
    greedy: bool = True
    """Also answer each prompt greedily where a reward is set."""
    engine: EngineConfig | None = None
    """None takes generate's."""


class AlarmConfig(Section):
    """When one alarm fires, and what then happens."""

    threshold: float | None
    """It fires from this value on; None turns it off."""
    action: Literal["note", "refuse", "stop"]
    """note: say so, on the screen and in the decision; refuse: the player is not promoted either;
    stop: the stage itself ends with exit code 5, and leaves no artifact."""


class AlarmsConfig(Section):
    """Signs of a collapse that loss and reward accuracy do not show; see docs/alarms.md.

    They change no number that a stage writes, so they are in no key but promote's.
    """

    generated_cut_off: AlarmConfig = AlarmConfig(threshold=0.5, action="note")
    """generate: share of the opponent's answers that were cut off."""
    generated_empty: AlarmConfig = AlarmConfig(threshold=0.05, action="note")
    """generate: share of the opponent's answers with nothing but white space."""
    identical_share: AlarmConfig = AlarmConfig(threshold=0.98, action="note")
    """pair: share of the pairs whose sides are equal."""
    chosen_fall: AlarmConfig = AlarmConfig(threshold=0.05, action="note")
    """train: nats a token that the chosen responses lost against the reference, mean over a tenth
    of the steps."""
    accuracy_saturated: AlarmConfig = AlarmConfig(threshold=0.995, action="note")
    """train: reward accuracy, mean over a tenth of the steps."""
    gradient_norm: AlarmConfig = AlarmConfig(threshold=10.0, action="note")
    """train: a step's gradient norm over the median of those before."""
    human_fall: AlarmConfig = AlarmConfig(threshold=0.1, action="refuse")
    """evaluate: nats a token that held-out human responses lost against the opponent."""
    accuracy_drop: AlarmConfig = AlarmConfig(threshold=3.0, action="refuse")
    """evaluate: fall of the sampled answers' mean reward below the opponent's, in standard
    errors."""
    unscored_rise: AlarmConfig = AlarmConfig(threshold=0.05, action="refuse")
    """evaluate: rise of the share of answers without a score, which accuracy leaves out."""
    divergence: AlarmConfig = AlarmConfig(threshold=0.25, action="note")
    """evaluate: nats a token that the player is from its opponent, on the opponent's answers."""
    heldout_saturated: AlarmConfig = AlarmConfig(threshold=0.99, action="note")
    """evaluate: held-out reward accuracy."""
    length_drift: AlarmConfig = AlarmConfig(threshold=1.5, action="refuse")
    """evaluate: how many times farther from the human mean length the player's is than the
    opponent's."""
    entropy_drop: AlarmConfig = AlarmConfig(threshold=0.9, action="note")
    """evaluate: share of the opponent's entropy a token that is gone."""
    repeated_rise: AlarmConfig = AlarmConfig(threshold=0.2, action="refuse")
    """evaluate: rise of the share of repeated 4-grams over the opponent's and the human ones'."""
    cut_off_rise: AlarmConfig = AlarmConfig(threshold=0.2, action="refuse")
    """evaluate: rise of the share of answers cut off over the opponent's."""
    empty_rise: AlarmConfig = AlarmConfig(threshold=0.05, action="refuse")
    """evaluate: rise of the share of empty answers over the opponent's."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Let a recipe change threshold or action alone."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            name: fields[name].default.model_dump() | value
            if name in fields and isinstance(value, dict)
            else value
            for name, value in values.items()
        }


class AdaptConfig(Section):
    """A setting that follows a measurement from one iteration to the next."""

    target_kl: Positive | None = None
    """Wanted mean divergence of a player from its opponent, in nats a response, on held-out
    prompts (evaluate's `heldout_kl`); None adapts nothing."""
    key: Literal["train.beta", "train.learning_rate"] = "train.beta"
    """What is adapted: β rises when the divergence is too large, the learning rate falls."""
    factor: Annotated[float, Field(gt=1)] = 2.0
    """Largest factor of one change; the change is (measured / target) ** ½ within it."""
    tolerance: Annotated[float, Field(ge=1)] = 1.5
    """Nothing changes while the measured value is within this factor of the target."""
    lowest: Positive | None = None
    highest: Positive | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "AdaptConfig":
        if self.lowest is not None and self.highest is not None and self.lowest > self.highest:
            raise ValueError(f"lowest={self.lowest} is above highest={self.highest}; swap them")
        return self


class StopConfig(Section):
    """When a run has converged; `spin run --until-converged` asks after each iteration."""

    max_iterations: Count = 10
    """Iterations at most."""
    discriminator_margin: Positive | None = 0.05
    """Stop when the held-out accuracy of the discriminator that the loss trains is within this of
    one half, with its whole confidence interval; None does not ask. Only where the chosen
    response is human."""
    identical_share: Share | None = None
    """Stop when this share of the opponent's answers equals the human ones."""
    min_gain: float | None = None
    """Stop when the metric of `promote` gained less than this in each of `patience` iterations."""
    patience: Count = 2
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


class TrackingConfig(Section):
    """Experiment trackers that are told metrics as they arise; see docs/tracking.md.

    Nothing of it enters a key, and no artifact depends on it.
    """

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = place(())
    """Those of the extra `trackers`; empty: none."""
    mode: Literal["offline", "online"] = place("offline")
    """`offline` writes files here and asks no network; `online` lets W&B, MLflow and Trackio go
    where their own environment variables point."""
    project: str | None = place(None)
    """What runs are filed under; None: the recipe's name."""
    group: str | None = place(None)
    """What joins the iterations of a run; None: the name of its directory."""
    every_steps: Count = place(1)
    """Optimizer steps between two points of a training curve."""
    dir: str | None = place(None)
    """Where they write; None: `tracking` in the run directory."""
