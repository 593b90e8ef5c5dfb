"""The GSM8K rule reward: the number after `####`, compared with the human answer's."""

import re

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_WINDOW_CHARS = 300


def gsm8k_reward(response: str, human_response: str) -> float:
    """Return 1.0 when the response's last `#### N` is that of the human response, else 0.0.

    As verl's reward: the last match within the last 300 characters, commas stripped, compared as
    text. A final full stop (`#### 12.`) is not part of the number.

    Raises:
        ValueError: the human response holds no answer, so nothing can be compared with it.
    """
    gold = final_answer(human_response)
    if gold is None:
        raise ValueError("the human response has no `#### N`")
    return float(final_answer(response) == gold)


def final_answer(text: str) -> str | None:
    """Return the last number after `####` in the last 300 characters, or None."""
    found = _ANSWER.findall(text[-_WINDOW_CHARS:])
    return found[-1].replace(",", "").rstrip(".") or None if found else None
