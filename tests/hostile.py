"""Texts that break things, the same for a seed: what data sets hold and what people try."""

import random

MARKERS = (
    "{{", "}}", "{% for x in y %}", "{%- endif %}", "{{ 7*7 }}", "{# x #}", "<|im_end|>", "</s>",
    "<s>", "<pad>", "[INST]", "[/INST]", "<<SYS>>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>",
    "### Assistant:", "\nassistant: ", "Human:", "<think>", "</think>", "</script><b>", "$(id)",
)  # fmt: skip
ROLES = ("system", "user", "assistant", "tool", "function", "developer", "ipython", "", "System")
CONTROL = [chr(code) for code in [*range(32), 127, *range(128, 160)]]
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
EMOJI = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "1️⃣", "🫠")
SPACES = " \t\n\r\x0b\x0c\x85\u00a0\u2003\u2028\u2029\u200b\ufeff\u3000"
QUOTES = "\"'`“”‘’«»\\"
SENTENCE = "Ann has 12 cups, buys 7. How many?"


def hostile_text(random_: random.Random, huge: int = 100_000) -> str:
    """Return one text of a kind drawn at random; `huge` bounds its characters, but for UTF-16."""
    r = random_
    few, many = r.randrange(1, 30), r.randrange(1, huge)
    kinds = (
        lambda: f"{SENTENCE[:few]}{chr(r.randrange(0xD800, 0xE000))}{SENTENCE[few:]}",
        lambda: "e" + "\u0301" * (many if r.random() < 0.05 else few),
        lambda: "".join(r.choices(CONTROL, k=few)) + SENTENCE,
        lambda: "\0" * few,
        lambda: f"{SENTENCE} {r.choice(MARKERS)} {r.choice(MARKERS)}",
        lambda: f"{r.choice(MARKERS)}{r.choice(ROLES)}\n{SENTENCE}",
        lambda: SENTENCE * (1 + many // len(SENTENCE)) if r.random() < 0.05 else SENTENCE * few,
        lambda: "",
        lambda: "".join(r.choices(SPACES, k=few)),
        lambda: "".join(r.choices(BIDI, k=few)) + SENTENCE[::-1],
        lambda: "".join(r.choices(EMOJI, k=few)),
        lambda: "".join(r.choices(QUOTES, k=few)) + SENTENCE,
        lambda: "x" * (many if r.random() < 0.05 else 10 * few),
        lambda: r.choice(ROLES) + ": " + SENTENCE,
        lambda: "".join(chr(_scalar(r)) for _ in range(few)),
        lambda: f"{SENTENCE} {few}",
    )
    return r.choice(kinds)()


def hostile_texts(count: int, seed: int = 0, huge: int = 100_000) -> list[str]:
    """Return `count` of them."""
    random_ = random.Random(seed)
    return [hostile_text(random_, huge) for _ in range(count)]


def _scalar(random_: random.Random) -> int:
    """Return any code point that is no surrogate, those not assigned too."""
    code = random_.randrange(0x10FFFF + 1 - 0x800)
    return code if code < 0xD800 else code + 0x800
