import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stages.config import LoraConfig
from stages.errors import ConfigError, CorruptError, InputError, SpinError
from stages.model import adapters
from stages.model.base import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_NAME
from stages.model.load import load_model
from stages.model.sharding import gathered
from stages.model.source import model_chain, resolve_model
from tests.families import tiny_model
from tests.lora_tools import ALONE, LORA, adapted, make_adapter, make_run, save_adapted

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "mistral", "gpt2", "phi3", "gpt_neox", "opt")
IDS = torch.arange(3, 20).unsqueeze(0)


def saved(family: str, folder: Path) -> Path:
    changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {}
    tiny_model(family, attention="eager", **changes).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved("llama", tmp_path / "llama")


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(
    family: str, tmp_path: Path
) -> None:
    folder = saved(family, tmp_path / family)
    model = load_model(folder)
    before = model(IDS).logits
    adapters.attach(model, LORA)
    adapters.fill(model, LORA, 0, None)
    after = model(IDS).logits
    assert torch.equal(before, after)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(list(adapters.factors(model))) > 0
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    after.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    names = {name for name, _ in plain(folder).named_parameters()}
    assert {name for name, _ in adapters.weights(model)} == names


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_peft_reads_and_merges(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / family)
    model = adapted(folder)
    merged = gathered(model, ALONE, torch.float32)
    out = save_adapted(model, resolve_model(str(folder)), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(plain(folder), out)
    assert torch.equal(theirs(IDS).logits, model(IDS).logits)
    wrote, reads = load_file(out / ADAPTER_WEIGHTS), peft.get_peft_model_state_dict(theirs)
    assert wrote.keys() == reads.keys()
    whole = dict(theirs.merge_and_unload().named_parameters())
    loaded = dict(load_model(out).named_parameters())
    assert merged is not None
    assert merged.keys() == whole.keys() == loaded.keys()
    before = dict(plain(folder).named_parameters())
    assert sum(not torch.equal(before[n], whole[n]) for n in whole) == len(wrote) // 2
    for name, weight in whole.items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-7)
        assert torch.equal(merged[name], loaded[name])


def test_a_peft_folder_opens_by_its_base_alone_where_that_does_not_move(
    llama: Path, tmp_path: Path
) -> None:
    out = make_adapter(llama, tmp_path / "adapter")
    opened = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(opened(IDS).logits, load_model(out)(IDS).logits)


def test_equal_adapters_have_equal_bytes(llama: Path, tmp_path: Path) -> None:
    one, other = (make_adapter(llama, tmp_path / name) for name in ("a", "b"))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    settings = json.loads((one / ADAPTER_CONFIG).read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])


def drawn(folder: Path, seed: int, maps: Any = "all-linear") -> dict[str, torch.Tensor]:
    model, config = load_model(folder), LoraConfig(rank=3, target_modules=maps)
    adapters.attach(model, config)
    adapters.fill(model, config, seed, None)
    return {name: p.detach() for name, letter, p in adapters.factors(model) if letter == "A"}


def test_the_draw_depends_on_seed_and_name_alone(llama: Path) -> None:
    torch.manual_seed(1)
    every = drawn(llama, 0)
    torch.manual_seed(2)
    some = drawn(llama, 0, ["v_proj", "layers.1.self_attn.q_proj"])
    assert sorted(some) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    assert all(torch.equal(every[name], some[name]) for name in some)
    other = drawn(llama, 1)
    values = [a.flatten() for a in (*every.values(), *other.values())]
    assert len({tuple(v.tolist()[:4]) for v in values}) == len(values)
    for a_RI in every.values():  # uniform between ± 1/√I, as peft draws it
        bound = 1 / math.sqrt(a_RI.shape[1])
        assert 0.9 * bound < a_RI.abs().max() <= bound
        assert abs(a_RI.mean()) < 0.3 * bound


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_in_parts_are_the_rows_of_the_whole(transposed: bool) -> None:
    a_RI, b_OR = torch.randn(3, 8), torch.randn(6, 3)
    adapter = adapters.Adapter(3, 5.0, {"map": (a_RI, b_OR)})
    whole = torch.zeros(8, 6) if transposed else torch.zeros(6, 8)
    for start in range(0, len(whole), 4):
        adapter.add_rows("map", whole[start : start + 4], start, transposed=transposed)
    change = (b_OR @ a_RI) * (5 / 3)
    torch.testing.assert_close(whole, change.T if transposed else change)


@pytest.mark.parametrize("wish", ["lm_head", "embed_tokens", "self_attn", "c_attn"])
def test_a_module_that_is_no_linear_map_of_a_layer_is_refused(llama: Path, wish: str) -> None:
    model = load_model(llama)
    with pytest.raises(ConfigError, match=f"'{wish}' is no linear map .* it has down_proj, gate"):
        adapters.attach(model, LoraConfig(target_modules=("q_proj", wish)))


def test_what_peft_refuses_is_one_line(tmp_path: Path) -> None:
    folder = saved("mamba", tmp_path / "mamba")
    with pytest.raises(ConfigError, match="peft refuses this model .*out_proj"):
        adapters.attach(load_model(folder), LORA)


def test_without_peft_training_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters.require_peft()
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'spin-selfplay\[peft\]'"):
        adapters.require_peft()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 4}, "lora.rank=4, but the adapter .* has 3"),
        ({"alpha": 6}, "lora.alpha=6.0, but the adapter .* has 5"),
        ({"target_modules": ("q_proj",)}, "has down_proj, gate_proj, k_proj, o_proj, q_proj"),
    ],
)
def test_training_on_needs_the_adapters_own_settings(
    llama: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    own, model = make_adapter(llama, tmp_path / "adapter"), load_model(llama)
    config = LORA.model_copy(update=changes)
    adapters.attach(model, LoraConfig.model_validate(config.model_dump()))
    with pytest.raises(ConfigError, match=match):
        adapters.fill(model, LoraConfig.model_validate(config.model_dump()), 0, own)


# -- Adapters as models ---------------------------------------------------------------------------


def test_an_adapter_on_an_adapter_is_the_sum(llama: Path, tmp_path: Path) -> None:
    first = make_adapter(llama, tmp_path / "first", seed=1)
    second = make_adapter(first, tmp_path / "second", seed=2)
    assert model_chain(second) == [llama, first, second]
    weight = "model.layers.1.mlp.up_proj.weight"
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    expected = load_file(llama / "model.safetensors")[weight]
    for folder in (first, second):
        stored = load_file(folder / ADAPTER_WEIGHTS)
        expected = expected + 5 / 3 * stored[name.format("B")] @ stored[name.format("A")]
    torch.testing.assert_close(load_model(second).state_dict()[weight], expected)


def test_a_merge_in_bf16_rounds_once_and_leaves_buffers_alone(llama: Path, tmp_path: Path) -> None:
    out = make_adapter(llama, tmp_path / "adapter")
    exact, half = load_model(out), load_model(out, torch.bfloat16)
    for (name, ours), (_, whole) in zip(
        half.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert torch.equal(ours, whole.to(torch.bfloat16)), name
    buffers = dict(load_model(llama, torch.bfloat16).named_buffers())
    assert {n: b.dtype for n, b in half.named_buffers()} == {n: b.dtype for n, b in buffers.items()}


def change_settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings | changes))

    return change


def add_tensor(folder: Path) -> None:
    stored = load_file(folder / ADAPTER_WEIGHTS)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**stored, name: torch.ones(32)}, folder / ADAPTER_WEIGHTS)


def of_another_model(folder: Path) -> None:
    stored = load_file(folder / ADAPTER_WEIGHTS)
    renamed = {name.replace("layers.0", "layers.7"): t for name, t in stored.items()}
    save_file(renamed, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (change_settings(use_dora=True), "more than plain LoRA .use_dora=True"),
        (change_settings(use_rslora=True), "more than plain LoRA .use_rslora=True"),
        (change_settings(alpha_pattern={"q_proj": 2}), "more than plain LoRA .alpha_pattern"),
        (change_settings(bias="all"), "more than plain LoRA .bias='all'"),
        (change_settings(init_lora_weights="pissa"), "more than plain LoRA .init_lora_weights"),
        (change_settings(new_kind=1), "more than plain LoRA .new_kind=1"),
        (add_tensor, "more than plain LoRA .*lora_magnitude_vector"),
        (of_another_model, "layers.7.* which its base does not have"),
        (lambda folder: (folder / ADAPTER_CONFIG).write_text("{}"), "no adapter that can be read"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None], match: str
) -> None:
    out = make_adapter(llama, tmp_path / "adapter")
    damage(out)
    with pytest.raises(InputError, match=match):
        load_model(out)


# -- The base -------------------------------------------------------------------------------------


def test_a_base_in_the_same_run_is_found_wherever_the_run_lies(llama: Path, tmp_path: Path) -> None:
    run, start = make_run(tmp_path / "run", llama)
    out = make_adapter(start, run / "iterations" / "000" / "train")
    assert json.loads((out / BASE_NAME).read_text())["path"] == "../../../models/start"
    assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] is None
    moved = run.rename(tmp_path / "moved")
    source = resolve_model(str(moved / "iterations/000/train"))
    assert source.base is not None
    assert source.base.path == moved / "models" / "start"
    load_model(source.verified())


def test_a_base_outside_of_the_run_is_named_in_full(llama: Path, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path / "run", llama)
    out = make_adapter(llama, run / "train")
    assert json.loads((out / BASE_NAME).read_text())["path"] == str(llama)
    assert [source.path for source in resolve_model(str(out)).chain()] == [llama, out]


def test_a_base_of_the_hub_is_named_by_its_commit(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = llama.rename(tmp_path / commit)
    asked = []

    def download(name: str, *, revision: str | None, **more: Any) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = resolve_model("org/model")
    out = save_adapted(adapted(snapshot), source, tmp_path / "adapter")
    assert json.loads((out / BASE_NAME).read_text())["path"] == f"org/model@{commit}"
    settings = json.loads((out / ADAPTER_CONFIG).read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/model", commit)
    assert resolve_model(str(out)).base == source
    assert model_chain(out) == [snapshot, out]
    assert asked == [("org/model", None), ("org/model", commit), ("org/model", commit)]


def rewrite_base(folder: Path, **changes: str) -> None:
    record = json.loads((folder / BASE_NAME).read_text())
    (folder / BASE_NAME).write_text(json.dumps(record | changes))


def take_away(folder: Path, run: Path) -> None:
    shutil.rmtree(run / "models" / "start")


def replace_base(folder: Path, run: Path) -> None:
    take_away(folder, run)
    other = tiny_model("llama", intermediate_size=40)
    other.save_pretrained(run / "models" / "start")


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (take_away, InputError, "cannot be opened: model .*models/start' does not exist"),
        (replace_base, InputError, r"which is another model now \(key folder:.*; put that one"),
        (lambda f, r: rewrite_base(f, content="0" * 64), InputError, "made anew with other bytes"),
        (lambda f, r: rewrite_base(f, path="../../other"), CorruptError, "no plain path inside it"),
        (lambda f, r: rewrite_base(f, extra="1"), CorruptError, "base.json is damaged"),
        (lambda f, r: (f / BASE_NAME).write_bytes(b"\xff"), CorruptError, "base.json is damaged"),
        (lambda f, r: (f / BASE_NAME).unlink(), InputError, "without base.json, so spin did not"),
        (
            lambda f, r: shutil.copy(r / "models/start/model.safetensors", f),
            InputError,
            "not adapter_model.safetensors alone",
        ),
    ],
)
def test_a_base_that_is_not_the_one_is_refused(
    llama: Path,
    tmp_path: Path,
    damage: Callable[[Path, Path], None],
    error: type[SpinError],
    match: str,
) -> None:
    run, start = make_run(tmp_path / "run", llama)
    out = make_adapter(start, run / "train")
    damage(out, run)
    with pytest.raises(error, match=match):
        resolve_model(str(out))


def test_an_adapter_outside_of_the_run_of_its_base_is_refused(llama: Path, tmp_path: Path) -> None:
    run, start = make_run(tmp_path / "run", llama)
    shutil.copytree(make_adapter(start, run / "train"), tmp_path / "alone")
    with pytest.raises(InputError, match="in the run that both were made in, but lies in no run"):
        resolve_model(str(tmp_path / "alone"))


def test_a_link_to_outside_of_the_run_is_refused_when_loading_too(
    llama: Path, tmp_path: Path
) -> None:
    run, start = make_run(tmp_path / "run", llama)
    out = make_adapter(start, run / "train")
    shutil.move(start, tmp_path / "elsewhere")
    start.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="no plain path inside it"):
        load_model(out)


def test_adapters_that_name_each_other_as_base_are_refused(llama: Path, tmp_path: Path) -> None:
    run, start = make_run(tmp_path / "run", llama)
    for name in ("a", "b"):
        make_adapter(start, run / name)
    rewrite_base(run / "a", path="../b")
    rewrite_base(run / "b", path="../a")
    with pytest.raises(CorruptError, match="a/base.json leads back to itself"):
        load_model(run / "a")


def test_the_key_of_a_plain_folder_covers_adapter_and_base(llama: Path, tmp_path: Path) -> None:
    one = resolve_model(str(make_adapter(llama, tmp_path / "one", seed=1))).ref.key
    other = resolve_model(str(make_adapter(llama, tmp_path / "two", seed=2))).ref.key
    folder = tmp_path / "three"
    shutil.copytree(tmp_path / "one", folder)
    shutil.copytree(llama, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(
        (llama / "config.json").read_text().replace("{", "{ ", 1)
    )
    rewrite_base(folder, **resolve_model(str(tmp_path / "copy")).as_base(folder).model_dump())
    assert len({one, other, resolve_model(str(folder)).ref.key}) == 3
