"""The sources of prompts that a section of the recipe names."""

from collections.abc import Mapping
from dataclasses import dataclass

from stages.config import PrepareConfig
from stages.data.sources import FileSource, Source, WordSumsSource, open_source
from stages.errors import ConfigError, InputError

GSM8K_ID, GSM8K_SUBSET = "openai/gsm8k", "main"


@dataclass(frozen=True)
class PrepareInputs:
    """The raw data, found but not yet read."""

    source: Source
    heldout_source: Source | None


def find_inputs(section: PrepareConfig, known_commits: Mapping[str, str]) -> PrepareInputs:
    """Find the sources that the settings name.

    Raises:
        ConfigError: they name none, or contradict each other.
        InputError: what they name does not exist.
    """
    if section.format == "word_sums":
        for name in ("source", "heldout_source", "heldout_split"):
            if getattr(section, name) is not None:
                raise ConfigError(
                    f"prepare.{name}={getattr(section, name)}: prepare.format=word_sums makes its "
                    f"own rows; unset prepare.{name}, or set prepare.format to what the data is"
                )
        task = section.word_sums
        return PrepareInputs(
            WordSumsSource(task.num_examples, task.style, task.seed, task.skip), None
        )
    source, subset = section.source, section.subset
    if source is None and section.format == "gsm8k":
        source, subset = GSM8K_ID, subset or GSM8K_SUBSET
    if source is None:
        raise ConfigError(
            "prepare.source is not set; set it to a file, a folder or a Hugging Face data set id"
        )
    found = open_source(
        source,
        split=section.split,
        subset=subset,
        revision=section.revision,
        setting="prepare.source",
        known_commits=known_commits,
    )
    if section.heldout_source is None and section.heldout_split is None:
        return PrepareInputs(found, None)
    if section.heldout_source is None and isinstance(found, FileSource) and not found.has_splits:
        raise ConfigError(
            f"prepare.heldout_split={section.heldout_split}: prepare.source={source} has no "
            "splits; set prepare.heldout_source, or unset prepare.heldout_split"
        )
    heldout_source = section.heldout_source or source
    same = heldout_source == source  # another data set has other subsets and commits
    heldout = open_source(
        heldout_source,
        split=section.heldout_split or section.split,
        subset=subset if same else None,
        revision=section.revision if same else None,
        setting="prepare.heldout_source" if section.heldout_source else "prepare.source",
        known_commits=known_commits,
    )
    return PrepareInputs(found, heldout)


def other_source(
    section: PrepareConfig, fingerprints: Mapping[str, str], commits: Mapping[str, str]
) -> str | None:
    """Return which source of the settings is not what prepared data was made of, if one is not.

    None too where that cannot be told from here: a source at a URL, or files that are elsewhere.
    Nothing is asked of the hub.

    Args:
        fingerprints: of the sources that the data was made of.
        commits: what revisions of the hub were resolved to then.
    """
    try:
        inputs = find_inputs(section, _Commits(commits))
    except (ConfigError, InputError):  # it is not here; what is wrong with it, prepare says
        return None
    for name in ("source", "heldout_source"):
        found: Source | None = getattr(inputs, name)
        if (found and found.fingerprint) != fingerprints.get(name):
            return name
    return None


class _Commits(dict[str, str]):
    """Commits of the hub; a data set that is not among them has none that is known."""

    def get(self, name: str, default: object = None) -> str:
        return super().get(name, "unknown")
