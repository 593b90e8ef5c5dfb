"""What a response says in the end: by this, responses to a prompt vote."""

from stages.config import RewardConfig
from stages.rewards.exact import normalised
from stages.rewards.gsm8k import final_answer
from stages.rewards.row_child import boxed_answer


def vote_of(response: str, config: RewardConfig) -> str | None:
    r"""Return the text that responses with the same answer share, or None where there is no answer.

    It is the final answer where the reward looks for one: the number after `####` (gsm8k), what
    stands in the last `\boxed{}` (math; plain numbers by their value, all else by its text, since
    each comparison of two expressions is a computation). Otherwise it is the whole response,
    normalised as the reward is told to (exact).
    """
    match config.name:
        case "gsm8k":
            return final_answer(response)
        case "math":
            return boxed_answer(response)
        case "exact":
            return normalised(response, config.exact)
    return response
