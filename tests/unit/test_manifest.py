"""Manifests: the text that was written, or refused."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from stages.artifacts import Manifest, open_artifact, read_manifest
from stages.artifacts.keys import canonical_json, open_sealed, row_seed, sealed_text, stage_key
from stages.errors import CorruptError, InputError
from tests.artifact_tools import hashes, input_ref, make, plan


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    out = tmp_path_factory.mktemp("run") / "out"
    make(out, plan(inputs={"data": input_ref()}, fingerprints={"chat": "f"}))
    return out


def with_manifest(tmp_path: Path, manifest: Manifest) -> Path:
    (tmp_path / "manifest.json").write_text(manifest.to_text())
    return tmp_path


def test_the_text_is_canonical_and_reads_back_the_same(artifact: Path) -> None:
    text = (artifact / "manifest.json").read_text()
    assert text == canonical_json(json.loads(text)) + "\n"
    assert read_manifest(artifact).to_text() == text


def test_equal_texts_in_another_form_are_refused(artifact: Path, tmp_path: Path) -> None:
    body = json.loads((artifact / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(body, indent=1))
    with pytest.raises(CorruptError, match=r"manifest\.json is damaged .* delete .* run its stage"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "7", '"x"', "{", '{"manifest_sha256": 7}', "\ufeff{}", "[" * 100_000],
)
def test_what_is_no_manifest_is_damaged(tmp_path: Path, text) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CorruptError, match="is damaged"):
        read_manifest(tmp_path)


def test_bytes_that_are_no_text_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00{}")
    with pytest.raises(CorruptError, match="is damaged"):
        read_manifest(tmp_path)


def test_changed_fields_with_a_recomputed_hash_still_meet_the_key(
    artifact: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(artifact)
    changed = manifest.model_copy(update={"config": {"seed": 1}})
    with pytest.raises(CorruptError, match="its key is not that of its fields"):
        read_manifest(with_manifest(tmp_path, changed))


def test_a_missing_field_is_named(artifact: Path, tmp_path: Path) -> None:
    body = open_sealed((artifact / "manifest.json").read_bytes(), "manifest_sha256")
    del body["counts"]
    (tmp_path / "manifest.json").write_text(sealed_text(body, "manifest_sha256"))
    with pytest.raises(CorruptError, match="is damaged .counts: Field required"):
        read_manifest(tmp_path)


def test_another_format_is_another_version_not_damage(artifact: Path, tmp_path: Path) -> None:
    body = open_sealed((artifact / "manifest.json").read_bytes(), "manifest_sha256")
    later = {**body, "manifest_format": 2, "a_new_field": 1}
    (tmp_path / "manifest.json").write_text(sealed_text(later, "manifest_sha256"))
    with pytest.raises(InputError, match="format 2, this spin reads 1; use the version"):
        read_manifest(tmp_path)


def test_no_manifest_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no artifact .no manifest.json.; run the stage"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="does not exist; run the stage that makes it"):
        read_manifest(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is no artifact"):
        read_manifest(tmp_path / "file")
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b"])
def test_paths_out_of_the_artifact_are_refused(artifact: Path, tmp_path: Path, path) -> None:
    manifest = read_manifest(artifact)
    entry = manifest.files[0].model_copy(update={"path": path})
    with_manifest(tmp_path, manifest.model_copy(update={"files": [entry]}))
    with pytest.raises(CorruptError):
        open_artifact(tmp_path)


def test_a_file_turned_into_a_link_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "timings.txt").rename(tmp_path / "moved")
    (tmp_path / "out" / "timings.txt").symlink_to(tmp_path / "moved")
    with pytest.raises(CorruptError, match="artifacts hold no links"):
        open_artifact(tmp_path / "out")


def test_a_file_is_verified_before_its_path_is_handed_out(tmp_path: Path) -> None:
    make(tmp_path / "out")
    opened = open_artifact(tmp_path / "out")
    victim = tmp_path / "out" / "notes" / "about.txt"
    victim.write_text("PLAIN\n")
    remedy = rf"about\.txt is damaged .SHA-256.*delete {tmp_path / 'out'} and run"
    with pytest.raises(CorruptError, match=remedy.replace(".SHA", ".its SHA")):
        opened.file("notes/about.txt")
    with pytest.raises(CorruptError):
        opened.files()
    assert opened.files("part-")


def test_a_file_that_vanished_after_opening_is_corrupt(tmp_path: Path) -> None:
    make(tmp_path / "out")
    opened = open_artifact(tmp_path / "out")
    (tmp_path / "out" / "timings.txt").unlink()
    with pytest.raises(CorruptError, match="cannot be read"):
        opened.file("timings.txt")


def test_skipping_verification_is_loud(tmp_path: Path, caplog) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "timings.txt").write_text("8 s\n")
    caplog.set_level(logging.WARNING, logger="spin")
    assert open_artifact(tmp_path / "out", verify=False).file("timings.txt")
    assert "hashes are NOT checked" in caplog.text


def test_a_file_that_is_not_listed_is_no_file_of_the_artifact(artifact: Path) -> None:
    with pytest.raises(InputError, match=r"has no rewards\.parquet; is it the artifact you meant"):
        open_artifact(artifact).file("rewards.parquet")


def test_input_ref_is_relative_to_the_run(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path / "run" / "iterations" / "000" / "pair")
    opened = open_artifact(tmp_path / "run" / "iterations" / "000" / "pair")
    inside = opened.input_ref(tmp_path / "run")
    assert (inside.path, inside.inside_run) == ("iterations/000/pair", True)
    outside = opened.input_ref(tmp_path / "other")
    assert (outside.path, outside.inside_run) == ("pair", False)
    assert inside.key == outside.key == opened.manifest.key
    monkeypatch.chdir(opened.path)
    assert open_artifact(Path()).input_ref(None).path == "pair"


def test_the_key_is_that_of_what_decides_the_content() -> None:
    base = plan(inputs={"data": input_ref()}, fingerprints={"chat": "f"})
    assert base.key == replace(base, config=dict(base.config)).key
    others = [
        replace(base, stage="score"),
        replace(base, format_version=2),
        replace(base, config={"seed": 1}),
        replace(base, inputs={"data": input_ref(key="other")}),
        replace(base, inputs={"other": input_ref()}),
        replace(base, fingerprints={"chat": "g"}),
    ]
    assert len({base.key, *(other.key for other in others)}) == len(others) + 1
    moved = replace(base, inputs={"data": input_ref(path="elsewhere", content="same key")})
    assert moved.key == base.key
    assert moved.attempt_key != base.attempt_key


def test_the_order_of_fields_does_not_decide_a_key() -> None:
    assert stage_key({"a": 1, "b": {"c": 2, "d": 3}}) == stage_key({"b": {"d": 3, "c": 2}, "a": 1})


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_a_key_is_stable_over_versions_of_this_code() -> None:
    """A change here makes every finished artifact of every user another one."""
    assert plan().key == "4a0a45f4a9f5a457b6ea39e03a94f7be48a82666d57d2d9a2899ee88390ea3ee"


def test_row_seeds_are_fixed_and_spread() -> None:
    assert row_seed(0, 0, "a", 0) == row_seed(0, 0, "a", 0)
    seeds = {
        row_seed(run, iteration, prompt, sample)
        for run in range(5) for iteration in range(5) for prompt in "abcde" for sample in range(5)
    }  # fmt: skip
    assert len(seeds) == 625
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_hashes_of_the_tools_skip_what_is_volatile(artifact: Path) -> None:
    assert "timings.txt" not in hashes(artifact)
