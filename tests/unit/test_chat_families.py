"""Prompts of model families: one BOS, the right end of turn, system prompts, special tokens.

Each family is a small tokenizer with that family's special tokens and template (in reduced form).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stages.config import ChatConfig
from stages.data.chat import Renderer, RowRefusedError, chat_fingerprints, make_renderer
from stages.engines.prompts import askable_batch, askable_tokens
from stages.errors import ConfigError, InputError
from stages.model.tokenizer import train_tokenizer
from tests.chat_templates import TEMPLATES
from tests.conftest import SENTENCES

QUESTION = [{"role": "user", "content": "How many cups?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
ANSWER = [{"role": "assistant", "content": "19"}]


@dataclass(frozen=True)
class Family:
    """What a model folder says of its tokens."""

    template: str | None
    bos: str | None
    eos: str
    adds_bos: bool = False
    """The tokenizer's post-processor begins plain text with BOS."""
    others: Sequence[tuple[str, bool]] = ()
    """Further added tokens, and whether they are special."""
    generation_eos: Sequence[str] | None = None
    """What generation_config.json lists; None: there is no such file."""
    config_eos: str | None = None
    """What config.json says, where there is one."""
    ends_with: str = ""
    """What a response must be closed with."""
    stops: Sequence[str] = ()
    """All that must end a response."""
    bos_origin: str = "none"
    refuses: Sequence[str] = field(default=())
    """Of system, twice (two questions in a row): what the template refuses."""


IM = [("<|im_start|>", True), ("<|im_end|>", True), ("<think>", False), ("</think>", False)]
HEADERS = [("<|start_header_id|>", True), ("<|end_header_id|>", True), ("<|eot_id|>", True)]
TURNS = [("<start_of_turn>", True), ("<end_of_turn>", True)]
FAMILIES = {
    "qwen2.5": Family(
        TEMPLATES["chatml"], None, "<|im_end|>", others=[*IM, ("<|endoftext|>", True)],
        generation_eos=["<|im_end|>", "<|endoftext|>"],
        ends_with="<|im_end|>", stops=["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen2.5 base, chat template": Family(
        TEMPLATES["chatml"], None, "<|endoftext|>", others=IM, generation_eos=["<|endoftext|>"],
        ends_with="<|im_end|>", stops=["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen3": Family(
        TEMPLATES["qwen3"], None, "<|im_end|>", others=[*IM, ("<|endoftext|>", True)],
        generation_eos=["<|im_end|>", "<|endoftext|>"],
        ends_with="<|im_end|>", stops=["<|im_end|>", "<|endoftext|>"],
    ),
    "llama2": Family(
        TEMPLATES["llama2"], "<s>", "</s>", adds_bos=True, generation_eos=["</s>"],
        ends_with="</s>", stops=["</s>"], bos_origin="template", refuses=["twice"],
    ),
    "llama3": Family(
        TEMPLATES["llama3"], "<|begin_of_text|>", "<|end_of_text|>", adds_bos=True, others=HEADERS,
        generation_eos=["<|end_of_text|>", "<|eot_id|>"], ends_with="<|eot_id|>",
        stops=["<|eot_id|>", "<|end_of_text|>"], bos_origin="template",
    ),
    "llama3, eos in the config alone": Family(
        TEMPLATES["llama3"], "<|begin_of_text|>", "<|eot_id|>", adds_bos=True,
        others=[*HEADERS, ("<|end_of_text|>", True)], config_eos="<|end_of_text|>",
        ends_with="<|eot_id|>", stops=["<|eot_id|>", "<|end_of_text|>"], bos_origin="template",
    ),
    "gemma": Family(
        TEMPLATES["gemma"], "<bos>", "<eos>", adds_bos=True, others=TURNS,
        generation_eos=["<eos>", "<end_of_turn>"], ends_with="<end_of_turn>",
        stops=["<eos>", "<end_of_turn>"], bos_origin="template", refuses=["system", "twice"],
    ),
    "gemma, end of turn not special": Family(
        TEMPLATES["gemma"], "<bos>", "<eos>", adds_bos=True,
        others=[("<start_of_turn>", False), ("<end_of_turn>", False), ("\n\n", False)],
        generation_eos=["<eos>"], ends_with="<end_of_turn>", stops=["<eos>", "<end_of_turn>"],
        bos_origin="template", refuses=["system", "twice"],
    ),
    "mistral": Family(
        TEMPLATES["mistral"], "<s>", "</s>", adds_bos=True, generation_eos=["</s>"],
        ends_with="</s>", stops=["</s>"], bos_origin="template", refuses=["system"],
    ),
    "zephyr": Family(
        TEMPLATES["zephyr"], "<s>", "</s>", adds_bos=True, generation_eos=["</s>"],
        ends_with="</s>", stops=["</s>"], bos_origin="tokenizer",
    ),
    "phi3": Family(
        TEMPLATES["phi3"], "<s>", "<|endoftext|>",
        others=[("<|end|>", True), ("<|user|>", True), ("<|assistant|>", True),
                ("<|system|>", True)],
        generation_eos=["<|endoftext|>", "<|end|>"],
        ends_with="<|end|>", stops=["<|end|>", "<|endoftext|>"],
    ),
    "vicuna": Family(
        TEMPLATES["vicuna"], "<s>", "</s>", adds_bos=True,
        ends_with="</s>", stops=["</s>"], bos_origin="tokenizer",
    ),
    "gpt2, vicuna's template": Family(
        TEMPLATES["vicuna"], "<|endoftext|>", "<|endoftext|>",
        ends_with="<|endoftext|>", stops=["<|endoftext|>"],
    ),
    "gpt2, no template": Family(
        None, "<|endoftext|>", "<|endoftext|>",
        ends_with="<|endoftext|>", stops=["<|endoftext|>"], bos_origin="template",
    ),
    "base model that adds BOS, no template": Family(
        None, "<s>", "</s>", adds_bos=True,
        ends_with="</s>", stops=["</s>"], bos_origin="template",
    ),
    "qwen base, no template": Family(
        None, None, "<|endoftext|>", ends_with="<|endoftext|>", stops=["<|endoftext|>"],
    ),
    "template that doubles BOS": Family(
        "{{ bos_token }}" + TEMPLATES["llama3"], "<|begin_of_text|>", "<|end_of_text|>",
        adds_bos=True, others=HEADERS, generation_eos=["<|end_of_text|>"],
        ends_with="<|eot_id|>", stops=["<|eot_id|>", "<|end_of_text|>"], bos_origin="collapsed",
    ),
}  # fmt: skip


def make_folder(folder: Path, family: Family) -> Path:
    """A model folder, but for its weights."""
    backend = train_tokenizer(SENTENCES, 300).backend_tokenizer
    added = [(family.eos, True), *family.others] + ([(family.bos, True)] if family.bos else [])
    for text, special in added:
        backend.add_tokens([AddedToken(text, special=special, normalized=False)])
    if family.adds_bos:
        assert family.bos is not None
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos
    )
    tokenizer.chat_template = family.template
    tokenizer.save_pretrained(folder)
    if family.generation_eos is not None:
        ids = [backend.token_to_id(text) for text in family.generation_eos]
        eos = ids if len(ids) > 1 else ids[0]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    if family.config_eos is not None:
        eos = backend.token_to_id(family.config_eos)
        (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def renderer(name: str, tmp_path: Path) -> Renderer:
    return make_renderer(make_folder(tmp_path / "model", FAMILIES[name]), ChatConfig())


def written(renderer: Renderer, messages: Any, *, ask: bool) -> str:
    """What the library itself renders."""
    text = renderer.tokenizer.apply_chat_template(
        messages, chat_template=renderer.template, tokenize=False, add_generation_prompt=ask
    )
    assert isinstance(text, str)
    return text


def test_a_prompt_begins_with_exactly_one_bos_or_with_none(name: str, renderer: Renderer) -> None:
    family = FAMILIES[name]
    bos = renderer.tokenizer.bos_token_id
    assert renderer.bos_origin == family.bos_origin
    assert renderer.bos_token_id == (None if family.bos_origin == "none" else bos)
    conversations = [QUESTION, [*QUESTION, *ANSWER, *QUESTION]]
    if "system" not in family.refuses:
        conversations.append([*SYSTEM, *QUESTION])
    for messages in conversations:
        tokens = renderer.prompt_tokens(messages)
        leading = [t == bos for t in tokens[:2]] if bos is not None else [False]
        assert leading[0] == (family.bos_origin != "none")
        assert not any(leading[1:])


def test_a_prompt_is_the_rendered_text_but_for_bos(name: str, renderer: Renderer) -> None:
    messages = [*QUESTION, *ANSWER, *QUESTION]
    bos = FAMILIES[name].bos or ""
    text = renderer.tokenizer.decode(renderer.prompt_tokens(messages))
    expected = written(renderer, messages, ask=True)
    assert text.removeprefix(bos) == expected.removeprefix(bos).removeprefix(bos or "\0")


def test_responses_end_as_the_template_ends_them(name: str, renderer: Renderer) -> None:
    family, tokenizer = FAMILIES[name], renderer.tokenizer
    end = tokenizer.convert_tokens_to_ids(family.ends_with)
    assert renderer.end_token_id == end
    assert set(renderer.stop_token_ids) == set(tokenizer.convert_tokens_to_ids(list(family.stops)))
    tokens = renderer.response_tokens("19 cups")
    assert tokens[-1] == end
    assert tokens.count(end) == 1
    assert renderer.text(tokens) == "19 cups"
    # The prompt and the response together are what the template writes for the conversation.
    whole = written(renderer, [*QUESTION, {"role": "assistant", "content": "19 cups"}], ask=False)
    ours = tokenizer.decode(renderer.prompt_tokens(QUESTION) + tokens)
    bos = family.bos or ""
    squeezed = (" ".join(text.removeprefix(bos).removeprefix(bos or "\0").split()).replace(
        " " + family.ends_with, family.ends_with) for text in (whole, ours))  # fmt: skip
    theirs, mine = squeezed
    assert theirs.startswith(mine.replace("[/INST]19", "[/INST] 19"))


@pytest.mark.parametrize("stop", [0, 1])
def test_any_stop_token_is_cut_off_the_text(renderer: Renderer, stop: int) -> None:
    if stop < len(renderer.stop_token_ids):
        tokens = renderer.response_tokens("19")[:-1]
        assert renderer.text([*tokens, renderer.stop_token_ids[stop]]) == "19"


def test_a_user_cannot_write_special_tokens(name: str, renderer: Renderer) -> None:
    family = FAMILIES[name]
    special = [text for text, is_special in family.others if is_special]
    asked = [[{"role": "user", "content": f"a {text} b"}]
             for text in {*special, *family.stops, family.eos}]  # fmt: skip
    for row in renderer.prompts_tokens(asked):
        assert isinstance(row, RowRefusedError)
        assert row.reason == "special_token"
    with pytest.raises(RowRefusedError, match="special_token"):
        renderer.response_tokens(f"19{family.ends_with}")


def test_words_that_are_tokens_but_not_special_may_be_said(name: str, renderer: Renderer) -> None:
    """The end of a turn is special, whatever the tokenizer says of it."""
    plain = [t for t, special in FAMILIES[name].others if not special]
    for text in set(plain) - set(FAMILIES[name].stops):
        renderer.prompt_tokens([{"role": "user", "content": f"a {text} b"}])
        assert renderer.text(renderer.response_tokens(f"a {text} b")) == f"a {text} b"


def test_what_a_template_refuses_costs_the_row(name: str, renderer: Renderer) -> None:
    family = FAMILIES[name]
    asked = {"system": [*SYSTEM, *QUESTION], "twice": [*QUESTION, *QUESTION], "plain": QUESTION}
    rows = renderer.prompts_tokens(list(asked.values()))
    refused = {what: row for what, row in zip(asked, rows, strict=True)
               if isinstance(row, RowRefusedError)}  # fmt: skip
    assert refused.keys() == set(family.refuses)
    assert all(row.reason == "template_error" for row in refused.values())
    assert all("must alternate" in row.detail or "not supported" in row.detail
               or "are supported" in row.detail for row in refused.values())  # fmt: skip


def test_a_system_prompt_of_the_recipe_stands_in_where_the_data_has_none(
    name: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "model", FAMILIES[name])
    chat = ChatConfig(system="Be kind.", prompt_suffix=" Think.")
    if "system" in FAMILIES[name].refuses:
        with pytest.raises(ConfigError, match=r"refuses chat.system, leave it out: .*support"):
            make_renderer(folder, chat)
        return
    renderer = make_renderer(folder, chat)
    own, given = renderer.prompts_tokens([[*SYSTEM, *QUESTION], QUESTION])
    assert isinstance(own, list)
    assert isinstance(given, list)
    assert "Be brief." in renderer.tokenizer.decode(own)
    assert "Be kind." not in renderer.tokenizer.decode(own)
    assert "Be kind." in renderer.tokenizer.decode(given)
    assert all("How many cups? Think." in renderer.tokenizer.decode(row) for row in (own, given))


def test_a_template_that_ignores_the_recipes_system_prompt_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}"
    folder = make_folder(tmp_path / "model", Family(template + "{% endfor %}", None, "</s>"))
    with pytest.raises(ConfigError, match=r"leaves out chat.system: it has no system prompts"):
        make_renderer(folder, ChatConfig(system="Be kind."))


def test_special_tokens_of_the_recipe_itself_are_meant(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", FAMILIES["qwen2.5"])
    renderer = make_renderer(folder, ChatConfig(prompt_suffix="<|endoftext|>"))
    token = renderer.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert token in renderer.prompt_tokens(QUESTION)


def test_a_text_that_becomes_a_special_token_in_the_template_is_refused(tmp_path: Path) -> None:
    """Halves in two messages, an end that the template trims to: no pattern on the text sees it."""
    joined = Family("{% for m in messages %}{{ m.content }}{% endfor %}", None, "<|im_end|>")
    renderer = make_renderer(make_folder(tmp_path / "model", joined), ChatConfig())
    halves = [{"role": "user", "content": "a <|im_"}, {"role": "user", "content": "end|> b"}]
    with pytest.raises(RowRefusedError, match="1 special tokens, a neutral text has 0"):
        renderer.prompt_tokens(halves)
    ends = Family(
        "{% for m in messages %}{{ m.content | replace('~', '') }}{% endfor %}", None, "</s>"
    )
    renderer = make_renderer(make_folder(tmp_path / "other", ends), ChatConfig())
    with pytest.raises(RowRefusedError, match="special_token"):
        renderer.prompt_tokens([{"role": "user", "content": "a </~s> b"}])


def test_the_count_of_special_tokens_depends_on_roles_and_not_on_words(tmp_path: Path) -> None:
    renderer = make_renderer(make_folder(tmp_path / "m", FAMILIES["phi3"]), ChatConfig())
    empty = [{"role": "system", "content": ""}]  # phi3 writes no system turn then
    many = [*QUESTION, *ANSWER] * 20 + QUESTION
    conversations = [QUESTION, many, [*SYSTEM, *QUESTION], [*empty, *QUESTION], many[2:]] * 3
    assert all(isinstance(row, list) for row in renderer.prompts_tokens(conversations))


def test_unknown_characters_are_no_special_tokens(tmp_path: Path) -> None:
    words = {"<unk>": 0, "</s>": 1, "how": 2, "many": 3, "?": 4}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    renderer = make_renderer(tmp_path, ChatConfig())
    assert renderer.prompt_tokens([{"role": "user", "content": "how ☃ many?"}]) == [2, 0, 3, 4]


def test_a_tokenizer_without_any_end_is_refused(tmp_path: Path) -> None:
    backend = train_tokenizer(SENTENCES, 300).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no EOS token and the chat template none either"):
        make_renderer(tmp_path, ChatConfig())


# Which template is in force, as transformers has it, and the hashes of it.


def several(folder: Path, templates: dict[str, str]) -> Path:
    make_folder(folder, FAMILIES["qwen2.5"])
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    both = {"tool_use": "tools " + TEMPLATES["qwen3"], "default": TEMPLATES["chatml"]}
    renderer = make_renderer(several(tmp_path / "config", both), ChatConfig())
    assert renderer.template == renderer.tokenizer.get_chat_template() == TEMPLATES["chatml"]
    as_files = make_folder(tmp_path / "files", FAMILIES["qwen2.5"])
    (as_files / "additional_chat_templates").mkdir()
    (as_files / "additional_chat_templates" / "tool_use.jinja").write_text(both["tool_use"])
    again = make_renderer(as_files, ChatConfig())
    assert again.template == again.tokenizer.get_chat_template() == TEMPLATES["chatml"]
    with pytest.raises(InputError, match=r"several chat templates \(tool_use\) and none called"):
        make_renderer(several(tmp_path / "x", {"tool_use": TEMPLATES["chatml"]}), ChatConfig())


def test_a_file_goes_before_the_config(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", FAMILIES[name])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }} and {{ messages[-1].content }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    renderer = make_renderer(folder, ChatConfig())
    assert renderer.template == renderer.tokenizer.get_chat_template()
    assert renderer.template == FAMILIES[name].template or FAMILIES[name].template is None


CHATML = ChatConfig(template=TEMPLATES["chatml"])


@pytest.mark.parametrize(
    ("chat", "differs"),
    [
        (CHATML, set()),  # the model's own, given by the recipe
        (ChatConfig(template=TEMPLATES["chatml"].replace("\n", "\r\n")), set()),
        (ChatConfig(template=TEMPLATES["qwen3"]), {"template"}),
        (ChatConfig(template="plain"), {"template"}),
        (ChatConfig(system="Be kind."), {"template"}),
        (ChatConfig(prompt_suffix=" "), {"template"}),
    ],
)
def test_settings_change_the_hash_of_the_template_alone(
    tmp_path: Path, chat: ChatConfig, differs: set[str]
) -> None:
    folder = make_folder(tmp_path, FAMILIES["qwen2.5"])
    before, after = chat_fingerprints(folder, ChatConfig()), chat_fingerprints(folder, chat)
    assert {n for n in before if before[n] != after[n]} == differs
    assert before.keys() == {"template", "tokenizer"}


def test_files_change_the_hash_that_they_belong_to(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, FAMILIES["qwen2.5"])

    def differs(chat: ChatConfig = ChatConfig()) -> set[str]:  # noqa: B008 - frozen
        now = chat_fingerprints(folder, chat)
        return {n for n in first if first[n] != now[n]}

    first = chat_fingerprints(folder, ChatConfig())
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [301, 300, 300], "temperature": 0.1})
    )
    others = {"eos_token_id": [300, 301], "transformers_version": "9"}
    swapped = chat_fingerprints(folder, ChatConfig())
    (folder / "generation_config.json").write_text(json.dumps(others))
    assert chat_fingerprints(folder, ChatConfig()) == swapped
    first = swapped
    (folder / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    assert differs() == {"template"}
    assert differs(CHATML) == set()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "something"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert differs(CHATML) == set()
    (folder / "generation_config.json").write_text('{"eos_token_id": 300}')
    assert differs(CHATML) == {"tokenizer"}
    (folder / "generation_config.json").write_text(json.dumps(others))
    assert differs(CHATML) == set()
    vocabulary = folder / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text() + "\n")
    assert differs(CHATML) == {"tokenizer"}


def test_a_tokenizer_that_is_not_made_yet_has_no_hash() -> None:
    assert chat_fingerprints(None, ChatConfig()).keys() == {"template"}
    assert chat_fingerprints(None, ChatConfig()) == chat_fingerprints(
        None, ChatConfig(template="plain")
    )


# What cannot be asked.


def test_tokens_that_the_model_does_not_know_are_not_asked(tmp_path: Path) -> None:
    renderer = make_renderer(make_folder(tmp_path, FAMILIES["qwen2.5"]), ChatConfig())
    tokens = askable_tokens(QUESTION, renderer, 500, max(renderer.prompt_tokens(QUESTION)) + 1)
    assert tokens == renderer.prompt_tokens(QUESTION)
    with pytest.raises(RowRefusedError, match=rf"token {max(tokens)}, the model knows"):
        askable_tokens(QUESTION, renderer, 500, max(tokens))


def test_a_huge_text_is_refused_by_its_beginning(tmp_path: Path) -> None:
    renderer = make_renderer(make_folder(tmp_path, FAMILIES["qwen2.5"]), ChatConfig())
    huge = "how many? " * 300_000
    asked = [QUESTION, [{"role": "user", "content": huge}], QUESTION,
             [{"role": "user", "content": "x" * (1 << 23)}, *QUESTION], []]  # fmt: skip
    good, long, again, longer, empty = askable_batch(asked, renderer, 100)
    assert good == again == renderer.prompt_tokens(QUESTION)
    assert isinstance(long, RowRefusedError)
    assert (long.reason, long.detail.split()[0]) == ("prompt_too_long", "more")
    assert isinstance(longer, RowRefusedError)
    assert "characters" in longer.detail
    assert isinstance(empty, RowRefusedError)
    assert empty.reason == "empty_prompt"
