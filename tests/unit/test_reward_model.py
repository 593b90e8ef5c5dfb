"""The reward model: its logits are those of transformers, whatever the batches and the engine."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from stages.config import EngineConfig, RewardConfig
from stages.engines.vllm import VllmScorer
from stages.errors import ConfigError, InputError
from stages.model.tokenizer import train_tokenizer
from stages.rewards import Question, Score, Unscored, find_reward, open_reward
from stages.rewards.model import TorchScorer
from tests.conftest import CHAT_TEMPLATE, SENTENCES
from tests.hostile import hostile_texts
from tests.unit.test_reward_stage import make_data, make_generations, run

MOST_TOKENS = 256
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": MOST_TOKENS,
}  # fmt: skip


ENDS_IN_EOS = CHAT_TEMPLATE.replace(
    "{{ eos_token }}{% endif %}{{ '\\n' }}", "{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
)


def save(
    folder: Path,
    make: Callable[..., PreTrainedModel],
    config: Any,
    template: str = CHAT_TEMPLATE,
    **settings: Any,
) -> Path:
    """Write a model with random weights, far enough from zero that the prompt matters."""
    tokenizer = train_tokenizer(SENTENCES, vocab_size=300)
    tokenizer.chat_template = template
    given = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config(vocab_size=len(tokenizer) + len(tokenizer) % 2, **SHAPE, **given))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    return save(folder, LlamaForSequenceClassification, LlamaConfig)


def question(*responses: str, prompt: str = "How many?") -> Question:
    return Question("0", [{"role": "user", "content": prompt}], "", responses)


QUESTIONS = [
    question("12", "12+7=19. #### 19", "", "x" * 50),
    question("Paris is the capital of France.", prompt="What is it? " * 7),
    Question("1", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q"},
                   {"role": "assistant", "content": "A"}, {"role": "user", "content": "And?"}],
             "", ("No.", "Yes, " * 20)),
]  # fmt: skip


def config(folder: Path, **settings: Any) -> RewardConfig:
    return RewardConfig(name="model", model={"path": str(folder), **settings})


def scores(config: RewardConfig, questions: Sequence[Question] = QUESTIONS) -> list[Score]:
    source = find_reward(config, None)
    assert source is not None
    with open_reward(source) as reward:
        return [score for scored in reward.score(questions) for score in scored.scores]


def by_transformers(folder: Path, questions: Sequence[Question] = QUESTIONS) -> list[float]:
    """One conversation at a time, as a model card says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for asked in questions:
        for response in asked.responses:
            messages = [*asked.messages, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                found.append(model(ids["input_ids"]).logits[0, 0].item())
    return found


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForSequenceClassification, LlamaConfig, {}),
    "no pad token": (LlamaForSequenceClassification, LlamaConfig, {"pad_token_id": None}),
    "end as pad token": (Qwen2ForSequenceClassification, Qwen2Config,
                         {"pad_token_id": 1, "template": ENDS_IN_EOS}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings", [{}, {"token_budget": 100}, {"token_budget": 1}, {"engine": {"batch_size": 2}}]
)
def test_logits_are_those_of_transformers_one_at_a_time(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    make, shape, given = FAMILIES[family]
    # The last has a template that ends with the end token, which is the model's padding too.
    folder = save(tmp_path / "model", make, shape, **given)
    expected = by_transformers(folder)
    assert len(set(expected)) == len(expected)
    assert scores(config(folder, **settings)) == pytest.approx(expected, abs=1e-5)


def test_bf16_is_near(reward_dir: Path) -> None:
    found = scores(config(reward_dir, engine={"dtype": "bfloat16"}))
    assert found != scores(config(reward_dir))
    assert found == pytest.approx(by_transformers(reward_dir), abs=0.1)


def test_a_template_of_the_recipe_is_the_one_that_is_used(reward_dir: Path) -> None:
    plain = config(reward_dir, template="plain")
    assert scores(plain) != scores(config(reward_dir))
    assert plain.identity() == config(reward_dir, template="plain").identity()
    assert plain.identity() != config(reward_dir).identity()


def test_what_the_model_cannot_take_has_no_score(reward_dir: Path) -> None:
    asked = [question("fine", "a</s>b", "x" * 300), question("fine", prompt="\ud800")]
    good, marked, long, malformed = scores(config(reward_dir), asked)
    assert isinstance(good, float)
    for score, why in (
        (marked, "special_token: '</s>' stands in the text"),
        (long, f"tokens, the reward model takes 1 to {MOST_TOKENS}"),
        (malformed, "malformed_text"),
    ):
        assert isinstance(score, Unscored)
        assert score.reason == "refused"
        assert why in score.detail
    short = config(reward_dir, engine={"max_model_len": 20})
    assert isinstance(scores(short, [question("x" * 40)])[0], Unscored)


def test_no_hostile_text_breaks_it(reward_dir: Path) -> None:
    texts = hostile_texts(300, seed=2, huge=2_000)
    asked = [question(*texts[at : at + 3]) for at in range(0, 300, 3)]
    found = scores(config(reward_dir), asked)
    assert len(found) == 300
    assert all(isinstance(s, Unscored) or math.isfinite(s) for s in found)
    assert sum(isinstance(s, float) for s in found) > 100


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_logits_that_are_not_finite_are_no_scores(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", *FAMILIES["llama"][:2])
    edit(folder, lambda weights: weights["score.weight"].fill_(math.nan))
    found = scores(config(folder))
    assert found == [Unscored("failed", "the reward model's logit is not finite")] * len(found)


def test_a_model_that_gives_no_rewards_is_refused(tmp_path: Path, reward_dir: Path) -> None:
    two = save(tmp_path / "two", *FAMILIES["llama"][:2], num_labels=2)
    with pytest.raises(InputError, match="LlamaForSequenceClassification with 2 labels; a reward"):
        scores(config(two))
    causal = save(tmp_path / "causal", LlamaForCausalLM, LlamaConfig)
    with pytest.raises(InputError, match="is LlamaForCausalLM with 1 labels"):
        scores(config(causal))
    headless = save(tmp_path / "headless", *FAMILIES["llama"][:2])
    edit(headless, lambda weights: weights.pop("score.weight"))
    with pytest.raises(InputError, match="lacks the weights score.weight; name a model"):
        scores(config(headless))
    mute = save(tmp_path / "mute", *FAMILIES["llama"][:2])
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template; set reward.model.template"):
        scores(config(mute))
    with pytest.raises(InputError, match="does not exist"):
        scores(config(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(ConfigError, match="max_model_len=1000: the model has 256 positions"):
        scores(config(reward_dir, engine={"max_model_len": 1000}))
    with pytest.raises(ConfigError, match="transformers scores in one process"):
        scores(config(reward_dir, engine={"processes": 2}))


def test_the_weights_enter_the_key_and_their_place_does_not(tmp_path: Path) -> None:
    first = save(tmp_path / "first", *FAMILIES["llama"][:2])
    same = save(tmp_path / "same", *FAMILIES["llama"][:2])
    other = save(tmp_path / "other", *FAMILIES["llama"][:2])
    edit(other, lambda weights: weights["score.weight"].mul_(2))
    data = make_data(tmp_path / "data", ["h", "h"])
    generations = make_generations(tmp_path / "generate", {0: ["a", "b"], 1: ["c"]})
    made = {
        folder.name: run(tmp_path / f"by-{folder.name}", data, generations, name="model",
                         model={"path": str(folder)})
        for folder in (first, same, other)
    }  # fmt: skip
    assert made["first"].key == made["same"].key != made["other"].key
    assert made["first"].inputs["reward_model"].key.startswith("folder:")
    twice = 2 * made["first"].metrics["mean_reward"]  # type: ignore[operator]
    assert made["other"].metrics["mean_reward"] == pytest.approx(twice, rel=1e-5)


def test_rows_that_hold_the_whole_vocabulary_are_scored_without_padding(tmp_path: Path) -> None:
    folder = save(tmp_path, Qwen2ForSequenceClassification, Qwen2Config, pad_token_id=None)
    config = RewardConfig(name="model", model={"path": str(folder)}).model
    scorer = TorchScorer(folder, config)
    size = scorer._model.config.vocab_size
    half = size // 2
    rows = [list(range(half)), list(range(half, size)), [3, 1, 2]]
    assert len(rows[0]) <= MOST_TOKENS
    alone = [score for row in rows for _, score in scorer.scores([row])]
    together = dict(scorer.scores(rows))
    assert [together[n] for n in range(3)] == pytest.approx(alone, abs=1e-5)


def test_what_makes_vllm_score_is_not_for_the_recipe(reward_dir: Path) -> None:
    pytest.importorskip("vllm")
    config = EngineConfig(name="vllm", extra={"runner": "generate"})
    with pytest.raises(ConfigError, match="extra may not set runner; spin sets these itself"):
        VllmScorer(reward_dir, config, max_model_len=MOST_TOKENS)
