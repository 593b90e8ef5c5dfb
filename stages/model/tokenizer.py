"""A tokenizer for a small model made from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stages.errors import ConfigError

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SMALLEST_VOCAB = 256 + 3  # every byte, and the three special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens.

    - `<s>`, `</s>` and `<pad>` are ids 0, 1 and 2.
    - Digits stand alone, so that numbers are written as they are added.
    - There is no normaliser: `decode(encode(x)) == x` for any valid Unicode text.
    - The same texts in any order give the same tokenizer.
    - Texts with little variety give fewer tokens than asked for: size the model by
      `len(tokenizer)`.

    It adds neither BOS nor EOS, and has no chat template: whoever renders prompts owns both.
    `<s>` written out in a text is read as the special token, as with every tokenizer of this
    library.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"train_tokenizer: vocab_size={vocab_size} cannot hold 256 bytes and 3 special tokens; "
            f"use at least {SMALLEST_VOCAB}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,  # it would turn " ." into "." on decoding
    )
