"""What the sections of a recipe are made of: types of fields, and how they are read."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
IterationIndex = Annotated[int, Field(ge=0)]


def refuse_no_names(value: Any) -> Any:
    """Say in words what a union of types says badly."""
    is_list = isinstance(value, list | tuple) and value and all(isinstance(n, str) for n in value)
    if not is_list and value != "all-linear":
        raise ValueError("give a list of names, such as [q_proj, v_proj], or all-linear")
    return value


def read_template(value: Any) -> Any:
    """Read a chat template from its file; `recipe://` has become a path by now."""
    if not isinstance(value, str) or not value.endswith(".jinja"):
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no UTF-8"
        raise ValueError(
            f"the template file cannot be read ({reason}); name one that exists, by its path or as "
            "recipe://FILE.jinja beside the recipe"
        ) from None


def template_identity(template: str | None) -> dict[str, Any]:
    """Return what stands for a template in keys: its hash, where it is a text of its own."""
    if template is None or template == "plain":
        return {}
    text = template.encode("utf-8", "surrogatepass")
    return {"template": hashlib.sha256(text).hexdigest()}


JUDGE_FIELDS = ("prompt", "answer_a", "answer_b", "human")
"""What may stand in braces in the template of a judge."""


def read_judge_template(value: Any) -> Any:
    """Read a judge's template from its file, and check that it shows both answers."""
    if isinstance(value, str) and value.endswith(".txt"):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "no UTF-8"
            raise ValueError(
                f"the template file cannot be read ({reason}); name one that exists, by its path "
                "or as recipe://FILE.txt beside the recipe"
            ) from None
    if isinstance(value, str):
        missing = [f"{{{name}}}" for name in JUDGE_FIELDS[:3] if f"{{{name}}}" not in value]
        if missing:
            raise ValueError(f"the template lacks {', '.join(missing)}; add it")
    return value


def check_pattern(value: str) -> str:
    """Check a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"no regular expression of Python's: {error}") from None
    return value


SECRET = re.compile(r"(?i)(?:key|token|secret|passw|auth|sig)[^=&]*=")
"""A query that looks as if it held one."""


def check_url(value: str | None) -> str | None:
    """Check that it is a URL of a server."""
    parts = urlsplit(value) if value is not None else None
    if parts is not None and (parts.scheme not in ("http", "https") or not parts.hostname):
        raise ValueError("give an http:// or https:// address, such as http://localhost:8000/v1")
    return value


ModuleNames = Annotated[Literal["all-linear"] | tuple[str, ...], BeforeValidator(refuse_no_names)]


def place(default: Any = ...) -> Any:
    """Declare a field that does not decide the result: a path, a batch size for speed."""
    return Field(default, json_schema_extra={"identity": False})


class Section(BaseModel):
    """A part of a recipe: frozen, its unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result, as plain JSON values.

        Sections are asked for theirs, those in mappings and lists too.
        """
        values = self.model_dump(mode="json")
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(info.json_schema_extra, dict):
                if info.json_schema_extra.get("identity") is False:
                    del values[name]
            else:
                values[name] = _identity(value, values[name])
        return values


def _identity(value: Any, plain: Any) -> Any:
    """Return what decides the result of a value.

    Args:
        plain: the whole value in JSON.
    """
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, dict) and value.keys() == plain.keys():
        return {name: _identity(inner, plain[name]) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_identity(inner, at) for inner, at in zip(value, plain, strict=True)]
    return plain
