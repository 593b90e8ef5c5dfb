"""A recipe: what a file, its blocks for iterations and overrides say, resolved by the schema.

A value comes from, in rising order of strength: the schema's default, the recipe file, the
recipe's `iterations` blocks for the iteration, wider ones first (`2+`, then `2-3`, then `2`), and
`section.key=value` overrides. `shrink`, where it is asked for, is merged over the file, and its own
`iterations` over the file's.

A section is merged over the same section, setting by setting. What is one of several kinds takes
the place of what was there as a whole: `promote.gate`, and a suite's entry of another kind.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from stages.config import ConditionConfig, RunConfig, suite_kinds
from stages.errors import ConfigError, choices

RECIPE_SCHEME = "recipe://"
SHRUNK = " --shrink"
"""Ends the source of a recipe's reduced form."""
ONE_OF_KINDS = "promote.gate"
"""The setting that is a tree of conditions; half of another tree's would mean nothing."""
OF_THE_RUN = ("name", "model", "chat", "prepare", "sft", "evaluate", "suites", "stop")
"""What no iteration changes."""


@dataclass(frozen=True)
class Span:
    """Iterations in a row: `2`, `1-2`, or `2+`, which has no end."""

    first: int
    last: int | None

    def __contains__(self, iteration: int | None) -> bool:
        """Tell whether an iteration is one of them."""
        if iteration is None or iteration < self.first:
            return False
        return self.last is None or iteration <= self.last

    def __str__(self) -> str:
        """Return how recipes write it."""
        if self.last is None:
            return f"{self.first}+"
        return f"{self.first}" if self.last == self.first else f"{self.first}-{self.last}"

    @property
    def width(self) -> tuple[float, int]:
        """What spans are ordered by, so that a narrow one comes after a wide one around it."""
        return (-math.inf if self.last is None else self.first - self.last, self.first)


def read_span(text: Any) -> Span:
    """Return the iterations that a recipe names.

    Raises:
        ValueError: it names none.
    """
    found = re.fullmatch(r"(\d+)(?:(\+)|-(\d+))?", str(text), re.ASCII)
    if isinstance(text, bool) or not found:
        raise ValueError(f"{text} is no iteration")
    first = int(found[1])
    last = None if found[2] else int(found[3] or first)
    if last is not None and last < first:
        raise ValueError(f"{text} ends before it begins")
    return Span(first, last)


@dataclass(frozen=True)
class Recipe:
    """A recipe before it is resolved for an iteration; plain data, so that it can be stored."""

    base: dict[str, Any]
    iterations: dict[Span, dict[str, Any]]
    overrides: dict[str, Any]
    """From dotted name to value."""
    source: str
    folder: Path | None = None
    """Where `recipe://` points."""

    def for_iteration(self, iteration: int | None = None) -> RunConfig:
        """Return the typed config that holds in one iteration.

        Raises:
            ConfigError: an unknown key, a wrong type, or a value out of range.
        """
        block, overrides = self._block(iteration), self._overrides(iteration)
        merged = _resolve(self.base, block, overrides)
        changes = block or overrides != self._overrides(None)
        where = f"{self.source}, iteration {iteration}" if changes else self.source
        return _validate(self._place_recipe_paths(merged), where)

    def with_overrides(self, overrides: Sequence[str]) -> "Recipe":
        """Return this recipe with further `section.key=value` overrides, the last one winning.

        Raises:
            ConfigError: an override is malformed or does not fit the schema.
        """
        parsed = _parse_overrides(overrides)
        before = {name: value for name, value in self.overrides.items() if name not in parsed}
        recipe = replace(self, overrides=before | parsed)
        recipe.check()
        return recipe

    def check(self) -> None:
        """Resolve the recipe for every iteration that it names.

        Raises:
            ConfigError: something in it does not fit the schema.
        """
        for iteration in [None, *self.turning_points()]:
            self.for_iteration(iteration)

    def turning_points(self) -> list[int]:
        """Return 0 and the iterations whose settings may differ from those of the one before."""
        spans = [*self.iterations, *(s for s, _ in map(_of_iterations, self.overrides) if s)]
        after = (span.last + 1 for span in spans if span.last is not None)
        return sorted({0, *(span.first for span in spans), *after})

    def configs(self) -> list[RunConfig]:
        """Return all settings that there are: outside the iterations, and from each turn on."""
        return [self.for_iteration(point) for point in (None, *self.turning_points())]

    def settings(self, iteration: int | None = None) -> dict[str, Any]:
        """Return what decides the results of one iteration, from dotted name to value."""
        return _flatten(self.for_iteration(iteration).identity())

    def origins(self, iteration: int | None = None) -> list[tuple[str, Any, str]]:
        """Return (dotted name, value, where it came from) for every value, in schema order."""
        config = self.for_iteration(iteration).model_dump(mode="json")
        resolved = _resolve(
            _labelled(self.base, self.source),
            _labelled(self._block(iteration), f"{self.source}, iteration {iteration}"),
            {n: _labelled(value, "override") for n, value in self._overrides(iteration).items()},
        )
        given = _flatten(resolved).items()
        labels = {name: leaf.label for name, leaf in given if isinstance(leaf, _Leaf)}
        return [(name, value, labels.get(name, "default"))
                for name, value in _flatten(config).items()]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values; see `recipe_from_json`."""
        return {
            "base": self.base,
            "iterations": {str(span): block for span, block in self.iterations.items()},
            # a list: their order decides, and JSON objects have none
            "overrides": [[name, value] for name, value in self.overrides.items()],
            "source": self.source,
            "folder": str(self.folder) if self.folder else None,
        }

    def _block(self, iteration: int | None) -> dict[str, Any]:
        """Return what holds in one iteration beside the base."""
        block: dict[str, Any] = {}
        for span in sorted(self.iterations, key=lambda span: span.width):
            if iteration in span:
                block = _merge(block, self.iterations[span])
        return block

    def _overrides(self, iteration: int | None) -> dict[str, Any]:
        """Return the overrides that hold in one iteration, the last one of a name."""
        found: dict[str, Any] = {}
        for given, value in self.overrides.items():
            span, name = _of_iterations(given)
            if span is None or iteration in span:
                found.pop(name, None)  # it comes last, so that it replaces what is in it
                found[name] = value
        return found

    def _place_recipe_paths(self, values: dict[str, Any]) -> dict[str, Any]:
        placed: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                value = self._place_recipe_paths(value)
            elif isinstance(value, str) and value.startswith(RECIPE_SCHEME):
                if self.folder is None:
                    raise ConfigError(f"{name}={value}: no recipe file to be beside; give a path")
                value = str(self.folder / value.removeprefix(RECIPE_SCHEME))
            placed[name] = value
        return placed


def load_recipe(
    path: Path | None, overrides: Sequence[str] = (), *, shrink: bool = False
) -> Recipe:
    """Read a recipe file and `section.key=value` overrides; everything is checked at once.

    Args:
        shrink: take the recipe's reduced form, which its `shrink` section describes.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, a value is wrong, or
            the recipe has no reduced form.
    """
    content = _read_yaml(path) if path else {}
    source = path.name if path else "defaults"
    smaller = _mapping(content.pop("shrink", None), f"{source}: shrink")
    blocks = _blocks(content, source)
    if shrink:
        if not smaller:
            raise ConfigError(
                f"{source} has no reduced form; add a `shrink` section with the settings of a "
                "small model and little data, or leave out --shrink"
            )
        source += SHRUNK
        for span, block in _blocks(smaller, source).items():
            blocks[span] = _merge(blocks.get(span, {}), block)
        content = _merge(content, smaller)
    recipe = Recipe(
        base=content,
        iterations=blocks,
        overrides=_parse_overrides(overrides),
        source=source,
        folder=path.resolve().parent if path else None,
    )
    recipe.check()
    return recipe


def recipe_from_json(data: Mapping[str, Any]) -> Recipe:
    """Return the recipe that `Recipe.to_json` wrote."""
    return Recipe(
        base=data["base"],
        iterations={read_span(text): block for text, block in data["iterations"].items()},
        overrides=dict(data["overrides"]),
        source=data["source"],
        folder=Path(data["folder"]) if data["folder"] else None,
    )


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, but for keys that stand twice: it would keep the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.YAMLError: one of its keys stands there twice.
        """
        seen = set()
        for key_node, _ in node.value:
            name = (key_node.tag, key_node.value)
            if isinstance(key_node.value, str) and name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value} stands there twice; merge the two",
                    key_node.start_mark,
                )  # fmt: skip
            seen.add(name if isinstance(key_node.value, str) else id(key_node))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"recipe {path} does not exist; see configs/ for those shipped") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"recipe {path} is no valid YAML: {reason}") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {path} is a directory; name a .yaml file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path} holds a {type(content).__name__}, a mapping is needed")
    return content


def _blocks(content: dict[str, Any], source: str) -> dict[Span, dict[str, Any]]:
    """Take the `iterations` section out of a recipe's content, and return it."""
    where = f"{source}: iterations"
    blocks = {}
    for text, block in _mapping(content.pop("iterations", None), where).items():
        try:
            span = read_span(text)
        except ValueError:
            raise ConfigError(
                f"{where}.{text}: iterations are numbered 0, 1, 2, …; 1-2 are several, 2+ is that "
                "and all after"
            ) from None
        if span in blocks:
            raise ConfigError(f"{where}.{text}: these iterations stand there twice; merge the two")
        blocks[span] = _mapping(block, f"{where}.{text}")
        for section in blocks[span]:
            _check_may_change(f"{where}.{text}.{section}", section)
    return blocks


def _check_may_change(where: str, section: str) -> None:
    if section in OF_THE_RUN:
        raise ConfigError(
            f"{where}: {section} holds for the whole run, or iterations could not be compared; "
            "move it out of `iterations` (so do "
            f"{', '.join(name for name in OF_THE_RUN if name != section)})"
        )


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds a {type(value).__name__}, a mapping is needed")
    return value


def _parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Return overrides by name, in the order of the last time that each was given."""
    parsed: dict[str, Any] = {}
    for text in texts:
        name, value = _parse_override(text)
        parsed.pop(name, None)
        parsed[name] = value
    return parsed


def _parse_override(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {text!r}: {value!r} is no valid YAML value") from None
    _check_block_override(name)
    return name, _number(parsed)


def _of_iterations(name: str) -> tuple[Span | None, str]:
    """Split `iterations.SPAN.section.key`, the name of an override, into its span and the rest."""
    head, _, rest = name.partition(".")
    span, _, key = rest.partition(".")
    return (read_span(span), key) if head == "iterations" else (None, name)


def _check_block_override(name: str) -> None:
    if name.partition(".")[0] != "iterations":
        return
    try:
        _, key = _of_iterations(name)
    except ValueError:
        key = ""
    if not key:
        raise ConfigError(
            f"override {name!r} is not of the form iterations.N.section.key=value, where N is "
            "0, 1, 2, …; 1-2 for several, 2+ for that and all after"
        )
    _check_may_change(f"override {name}", key.partition(".")[0])


def _number(value: Any) -> Any:
    """Read `5e-7` as the number it is; YAML 1.1 takes it for text."""
    if isinstance(value, str):
        try:
            return float(value) if value[:1] in "+-.0123456789" and value else value
        except ValueError:
            return value
    return value


def _resolve(
    base: Mapping[str, Any], block: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    merged = _merge(base, block)
    for name, value in overrides.items():
        merged = _put(merged, name, value)
    return merged


def _put(values: Mapping[str, Any], name: str, value: Any, place: str = "") -> dict[str, Any]:
    """Return values with one set, or merged with the section that is there, under a dotted name."""
    head, _, rest = name.partition(".")
    if not rest:
        return _merge(values, {head: value}, place)
    inner = values.get(head)
    inner = inner if isinstance(inner, Mapping) else {}
    return {**values, head: _put(inner, rest, value, f"{place}{head}.")}


def _merge(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    merged = dict(old)
    for name, value in new.items():
        at, before = f"{place}{name}", merged.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[name] = _merge({} if _replaces(at, before, value) else before, value, f"{at}.")
        else:
            merged[name] = value
    return merged


def _replaces(place: str, before: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Tell whether a mapping takes the place of the one before it as a whole."""
    if re.fullmatch(r"suites\.[^.]+", place):
        return "kind" in value and value["kind"] != before.get("kind")
    return place == ONE_OF_KINDS


@dataclass(frozen=True)
class _Leaf:
    """A value and where it came from."""

    value: Any
    label: str = field(compare=False)


def _labelled(values: Any, label: str) -> Any:
    if isinstance(values, Mapping):
        return {name: _labelled(value, label) for name, value in values.items()}
    return _Leaf(values, label)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _validate(values: dict[str, Any], source: str) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, values)}") from None


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    found = error.errors(include_url=False)
    # a key that is unknown may be why another one is missing
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    place = _place(first["loc"], values)
    name = ".".join(place)
    if first["type"] == "extra_forbidden" and name.startswith(f"{ONE_OF_KINDS}."):
        known = choices(place[-1], _keys_of_gate(place), "known here:")
        return f"unknown key {name}; {known}"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, _keys_beside(place, values), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; `spin config show` lists all keys"
        return f"unknown key {name}{hint}"
    if first["type"] == "missing":
        return f"{name} is missing; set it"
    if first["type"].startswith("union_tag"):
        return _explain_kind(name, first["input"], values)
    needed = {"model_type": "a mapping is needed", "tuple_type": "a list is needed"}
    message = needed.get(first["type"], first["msg"].removeprefix("Value error, "))
    if not name:
        return message
    of_section = first["type"] == "value_error" and isinstance(first["input"], Mapping)
    given = "" if of_section else f"={first['input']!r}"
    return f"{name}{given}: {message}{_near_choice(first)}"


def _near_choice(error: ErrorDetails) -> str:
    """Return which of a setting's choices may have been meant, where it has choices."""
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    known = re.findall("'([^']+)'", error["ctx"]["expected"])
    near = difflib.get_close_matches(error["input"], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _place(loc: Sequence[int | str], values: Any) -> list[str]:
    """Return where an error is, without the kind of a suite, which pydantic puts after its name."""
    place: list[str] = []
    in_kind = False
    for part in loc:
        if isinstance(values, Mapping) and values.get("kind") == part and not in_kind:
            in_kind = True
            continue
        place.append(str(part))
        in_kind = False
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
    return place


def _keys_beside(place: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Return the dotted names of the keys that one at a place may have been meant for."""
    if place[0] != "suites" or len(place) < 3:
        return known_keys()
    return known_keys(suite_kinds()[values["suites"][place[1]]["kind"]], f"suites.{place[1]}.")


def _keys_of_gate(place: Sequence[str]) -> list[str]:
    """Return what may stand beside a key in a gate."""
    fields = ConditionConfig.model_fields
    inner = _section_type(fields[place[-2]].annotation) if place[-2] in fields else None
    return list((inner or ConditionConfig).model_fields)


def _explain_kind(name: str, suite: Any, values: Mapping[str, Any]) -> str:
    """Say that a suite has no kind, or one that there is not."""
    kinds = ", ".join(suite_kinds())
    kind = suite.get("kind") if isinstance(suite, Mapping) else None
    if kind is not None:
        near = difflib.get_close_matches(str(kind), suite_kinds(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}.kind={kind!r}: there is no such kind of suite, but {kinds}{hint}"
    others = [f"suites.{other}" for other in values["suites"] if f"suites.{other}" != name]
    near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
    hint = f"; or did you mean {near[0]}?" if near else ""
    return f"{name} has no kind; set {name}.kind to one of {kinds}{hint}"


def known_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return the dotted names of all keys of the schema."""
    names: list[str] = []
    for name, info in section.model_fields.items():
        names.append(f"{prefix}{name}")
        inner = _section_type(info.annotation)
        if inner is not None:
            names += known_keys(inner, f"{prefix}{name}.")
    return names


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = getattr(annotation, "__args__", (annotation,))
    found = (t for t in options if isinstance(t, type) and issubclass(t, BaseModel))
    return next(found, None)
