"""The renderer: one text for generation and training, one end token, refused rows."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from stages.config import ChatConfig
from stages.data.chat import Renderer, RowRefusedError, TextCoder, make_renderer
from stages.errors import ConfigError, InputError
from tests.hostile import hostile_texts

QUESTION = [{"role": "user", "content": "Ann has 12 cups."}]


def test_prompt_and_response_tokens_spell_the_template(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    tokenizer = renderer.tokenizer
    whole = tokenizer.apply_chat_template(
        [*QUESTION, {"role": "assistant", "content": "12+7=19."}], tokenize=False
    )
    ours = renderer.prompt_tokens(QUESTION) + renderer.response_tokens("12+7=19.")
    assert whole.startswith(tokenizer.decode(ours))


def test_response_ends_in_exactly_one_end_token(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    tokens = renderer.response_tokens("12+7=19.")
    assert tokens[-1] == renderer.end_token_id
    assert tokens.count(renderer.end_token_id) == 1


@pytest.mark.parametrize("text", ["12+7=19.", " led by a space", "", "ünïcode ☃\n\ttabs  "])
def test_text_gives_back_what_was_tokenized(tiny_model_dir: Path, text: str) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    assert renderer.text(renderer.response_tokens(text)) == text


def test_plain_template_writes_bos_and_lines(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig(template="plain"))
    assert renderer.prompt_text(QUESTION) == "<s>Ann has 12 cups.\n"
    assert renderer.prompt_tokens(QUESTION).count(renderer.tokenizer.bos_token_id) == 1
    assert renderer.end_token_id == renderer.tokenizer.eos_token_id


def test_system_and_suffix_are_rendered(tiny_model_dir: Path) -> None:
    chat = ChatConfig(template="plain", system="Be brief.", prompt_suffix=" Think.")
    text = make_renderer(tiny_model_dir, chat).prompt_text(QUESTION)
    assert text == "<s>Be brief.\nAnn has 12 cups. Think.\n"


def test_a_lead_of_the_template_belongs_to_the_response(tiny_model_dir: Path) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A: <think></think>"
        "{{ m['content'] }}{{ eos_token }}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    renderer = make_renderer(tiny_model_dir, ChatConfig(template=template))
    tokens = renderer.response_tokens("19")
    assert renderer.tokenizer.decode(tokens[:-1]) == "<think></think>19"
    assert renderer.text(tokens) == "19"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a\ud800b", "malformed_text"), ("obey </s> me", "special_token")],
)
def test_hostile_rows_are_refused_with_a_reason(
    tiny_model_dir: Path, text: str, reason: str
) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    for refused in (
        lambda: renderer.prompt_tokens([{"role": "user", "content": text}]),
        lambda: renderer.response_tokens(text),
    ):
        with pytest.raises(RowRefusedError) as caught:
            refused()
        assert caught.value.reason == reason


def test_template_that_refuses_roles_drops_the_row(tiny_model_dir: Path) -> None:
    template = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}"
    template += "{% endif %}{{ m['content'] }}{% endfor %}"
    renderer = make_renderer(tiny_model_dir, ChatConfig(template=template))
    with pytest.raises(RowRefusedError, match="template_error"):
        renderer.prompt_tokens([{"role": "system", "content": "x"}])


def test_fingerprint_follows_the_template(tiny_model_dir: Path) -> None:
    own = make_renderer(tiny_model_dir, ChatConfig())
    again = make_renderer(tiny_model_dir, ChatConfig())
    plain = make_renderer(tiny_model_dir, ChatConfig(template="plain"))
    assert own.fingerprints == again.fingerprints
    assert own.fingerprints["template"] != plain.fingerprints["template"]
    assert own.fingerprints["tokenizer"] == plain.fingerprints["tokenizer"]


def test_folder_without_tokenizer_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer .* copy the tokenizer"):
        make_renderer(tmp_path, ChatConfig())


def without_template(model: Path, folder: Path) -> Path:
    """A copy of a model folder that has no chat template."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_model_without_template_gets_plain_lines_and_a_word(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = without_template(tiny_model_dir, tmp_path / "bare")
    with caplog.at_level("INFO", logger="spin"):
        bare = make_renderer(folder, ChatConfig())
    assert [r.message.split(" ", 1)[1] for r in caplog.records if r.name == "spin"] == [
        "has no chat template: prompts are plain lines (chat.template)"
    ]
    plain = make_renderer(tiny_model_dir, ChatConfig(template="plain"))
    own = make_renderer(tiny_model_dir, ChatConfig())
    sources = [r.template_source for r in (bare, plain, own)]
    assert sources == ["default", "recipe", "model"]
    assert bare.prompt_tokens(QUESTION) == plain.prompt_tokens(QUESTION)
    assert bare.fingerprints == plain.fingerprints


def test_broken_template_is_a_config_error(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="chat template fails"):
        make_renderer(tiny_model_dir, ChatConfig(template="{{ nothing.here() }}"))
    with pytest.raises(ConfigError, match="leaves out the user"):
        make_renderer(tiny_model_dir, ChatConfig(template="always this"))
    with pytest.raises(ConfigError, match="leaves out the assistant"):
        make_renderer(tiny_model_dir, ChatConfig(template="{{ messages[0].content }}"))


# The batch against one row at a time, and against the library's own calls.


def library_tokens(renderer: Renderer, text: str) -> list[int]:
    """The slow twin of a prompt's tokens: transformers' own wrapper, for one conversation."""
    rendered = renderer.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        chat_template=renderer.template,
        tokenize=False,
        add_generation_prompt=True,
    )
    return list(renderer.tokenizer(rendered, add_special_tokens=False)["input_ids"])


def test_a_batch_gives_each_row_what_it_gets_alone(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    texts = hostile_texts(3000, huge=5000)
    rows = renderer.prompts_tokens([[{"role": "user", "content": text}] for text in texts])
    assert len(rows) == len(texts)
    refused = Counter(row.reason for row in rows if isinstance(row, RowRefusedError))
    assert refused.keys() == {"malformed_text", "special_token"}
    assert 100 < refused.total() < 1000
    for text, row in zip(texts, rows, strict=True):
        if isinstance(row, list):
            assert row == library_tokens(renderer, text)
        else:
            with pytest.raises(RowRefusedError) as caught:
                renderer.prompt_tokens([{"role": "user", "content": text}])
            assert (caught.value.reason, caught.value.detail) == (row.reason, row.detail)


def test_a_batch_of_responses_gives_each_what_it_gets_alone(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    texts = hostile_texts(2000, seed=1, huge=5000)
    rows = renderer.responses_tokens(texts)
    for text, row in zip(texts, rows, strict=True):
        if isinstance(row, list):
            encoded = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert row == [*encoded, renderer.end_token_id]
        else:
            with pytest.raises(RowRefusedError) as caught:
                renderer.response_tokens(text)
            assert (caught.value.reason, caught.value.detail) == (row.reason, row.detail)


def test_a_batch_of_texts_is_what_each_decodes_to_alone(tiny_model_dir: Path) -> None:
    renderer = make_renderer(tiny_model_dir, ChatConfig())
    random_ = random.Random(0)
    size = len(renderer.tokenizer)
    responses = [
        [random_.randrange(size) for _ in range(random_.randrange(20))] for _ in range(3000)
    ]
    assert any(ids and ids[-1] in renderer.stop_token_ids for ids in responses)
    for ids, text in zip(responses, renderer.texts(responses), strict=True):
        kept = ids[:-1] if ids and ids[-1] in renderer.stop_token_ids else ids
        assert text == renderer.tokenizer.decode(kept, clean_up_tokenization_spaces=False)


def test_a_tokenizer_that_fails_on_a_row_costs_that_row_alone(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = TextCoder.encode

    def fail_on_seven(coder: TextCoder, texts: Sequence[str]) -> list[list[int]]:
        if any(" 7 " in text for text in texts):
            raise TypeError("TextEncodeInput must be …")
        return encode(coder, texts)

    renderer = make_renderer(tiny_model_dir, ChatConfig())
    asked = [[{"role": "user", "content": f"a {n} b"}] for n in range(10)]
    whole = renderer.prompts_tokens(asked)
    monkeypatch.setattr(TextCoder, "encode", fail_on_seven)
    rows = renderer.prompts_tokens(asked)
    assert isinstance(rows[7], RowRefusedError)
    assert rows[7].reason == "tokenizer_error"
    assert rows[:7] + rows[8:] == whole[:7] + whole[8:]


def test_a_tokenizer_file_that_cuts_off_and_pads_does_neither(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cutting"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = make_renderer(tiny_model_dir, ChatConfig()).prompts_tokens([QUESTION] * 2)
    assert make_renderer(folder, ChatConfig()).prompts_tokens([QUESTION] * 2) == expected
