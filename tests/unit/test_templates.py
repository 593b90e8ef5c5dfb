"""Chat templates in their own process: as transformers renders them, and unable to harm us."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from stages.data import templates
from stages.data.templates import Failed, Template
from stages.errors import ConfigError
from tests.chat_templates import TEMPLATES
from tests.hostile import hostile_texts

ROOT = Path(__file__).parents[2]
CONSTANTS = {"bos_token": "<s>", "eos_token": "</s>"}
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


def conversation(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of these texts, user first; with a system prompt."""
    first = [] if system is None else conversation(system, "system")
    roles = ("user", "assistant")
    return first + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


CONVERSATIONS = [
    turns("1+1?"),
    turns("1+1?", "2", "  and 2+2? "),
    turns("1+1?", "<think>easy</think>\n\n2", "3?", system="Be brief."),
    turns("1+1?", "2", system=""),
    turns(""),
    conversation("no user at all", "assistant"),
    [*conversation("one"), *conversation("two")],
    conversation("odd role", "tool"),
]
FEATURES = {
    "filters": "{{ messages[0].content | trim | upper | tojson }}{{ messages | tojson(indent=1) }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ loop.index0 }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "macro": "{% macro say(m) %}[{{ m['role'] }}]{% endmacro %}{{ say(messages[0]) }}",
    "white space": "  {% if true %}\n  {{ messages[0]['content'] }}  \n {%- endif %}\n\n",
    "nothing given": "{{ tools is none }}{{ documents is none }}{{ absent is defined }}{{ nope }}",
    "constants": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ add_generation_prompt }}",
    "raises": "{{ raise_exception('not like this') }}",
    "wrong type": "{{ messages[0].content + 1 }}",
    "no method": "{{ messages.nothing() }}",
    "syntax": "{% for %}",
    "unsafe": "{{ messages.__class__.__mro__ }}",
    "immutable": "{% set _ = messages.append(1) %}{{ messages | length }}",
    "escapes": "{{ '<b>&' }}\\n{{ '\\n' }}\r\nend",
    "slices": "{{ messages[1:] | length }}{{ messages[0]['content'][:2] }}{{ 'a' * 3 }}",
    "range": "{{ range(99) | list | length }}{% for i in range(200000) %}{% endfor %}",
}


def in_transformers(template: str, messages: Any, ask: bool) -> str | None:
    """The slow twin: what the library itself renders, None where it raises."""
    try:
        [text], _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=ask, **CONSTANTS
        )
    except Exception:  # noqa: BLE001 - a template raises what it likes
        return None
    return str(text)


@pytest.mark.parametrize("name", [*TEMPLATES, *FEATURES])
def test_templates_render_as_in_transformers(name: str) -> None:
    text = {**TEMPLATES, **FEATURES}[name]
    template = Template(text, CONSTANTS)
    for ask in (True, False):
        for messages, found in zip(
            CONVERSATIONS, template.render(CONVERSATIONS, ask=ask), strict=True
        ):
            expected = in_transformers(text, messages, ask)
            assert found == expected or (expected is None and isinstance(found, Failed))


def test_odd_texts_render_as_in_transformers() -> None:
    asked = [conversation(text) for text in hostile_texts(2000, huge=5000)]
    found = Template(TEMPLATES["chatml"], CONSTANTS).render(asked)
    assert found == [in_transformers(TEMPLATES["chatml"], messages, True) for messages in asked]


def test_the_reason_of_a_template_is_passed_on() -> None:
    [found] = Template(FEATURES["raises"], {}).render([conversation("x")])
    assert found == Failed("not like this")


def test_a_prompt_does_not_change_overnight() -> None:
    found = Template("{{ strftime_now('%d %b %Y') }}", {}).render([conversation("x")])
    assert found == ["26 Jul 2024"]


# Templates that are out to harm, on every conversation.

HOSTILE = {
    "loops for ever": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "writes without end": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "gigabytes": "{{ 'a' * 10**9 }}",
    "gigabytes at run time": "{{ messages[0].content * 10**9 }}",
    "centre": "{{ 'a'.center(10**9) }}",
    "centre filter": "{{ messages[0].content | center(10**9) }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "doubling": "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s"
    " %}{% endfor %}{{ ns.s }}",
    "doubling a list": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s"
    " + ns.s %}{% endfor %}{{ ns.s }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "huge number": "{{ 9 ** (9 ** 9) }}",
    "huge number at run time": "{{ (messages | length + 8) ** (9 ** 9) }}",
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep calls": "{{ " + "-" * 50_000 + "1 }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "tojson": "{{ ([messages] * 10**7) | tojson }}",
    "replace": "{{ ('a' * 30000).replace('a', 'b' * 90000) }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_within_seconds(name: str) -> None:
    began = time.monotonic()
    template = Template(HOSTILE[name] + PLAIN, {})
    [found] = template.render([conversation("x")])
    assert isinstance(found, Failed)
    assert found.why
    assert "\n" not in found.why
    assert len(found.why) <= 500
    assert time.monotonic() - began < 30  # some 4 s of its processor time at most
    # The next template, and the rows that follow, are as ever.
    assert Template(PLAIN, {}).render([conversation("y")]) == ["y"]


def peak_bytes(pid: int) -> int:
    [line] = [x for x in Path(f"/proc/{pid}/status").read_text().split("\n") if "VmHWM" in x]
    return int(line.split()[1]) << 10


def child_pid() -> int:
    Template(PLAIN, {}).render([conversation("x")])
    popen = templates._process._popen
    assert popen is not None
    return popen.pid


def test_memory_of_the_process_is_bounded_and_it_survives_that() -> None:
    pid = child_pid()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert f"Max address space         {1 << 29}" in limits
    [found] = Template("{{ messages[0].content * 10**9 }}", {}).render([conversation("x")])
    assert found == Failed("it takes more than 512 MiB of memory", True)
    assert child_pid() == pid
    assert peak_bytes(pid) < 1 << 29


def bad_on_some(harm: str) -> Template:
    """A template that does harm to conversations with the word bad."""
    return Template("{% if 'bad' in messages[0].content %}" + harm + "{% endif %}" + PLAIN, {})


@pytest.mark.parametrize(
    "name", ["loops for ever", "gigabytes at run time", "huge number at run time"]
)
def test_a_row_that_a_template_is_bad_on_costs_itself_alone(name: str) -> None:
    harm = HOSTILE[name]
    template = bad_on_some(harm)
    texts = [f"bad {n}" if n in (30, 501) else f"good {n}" for n in range(600)]
    parts = [[conversation(text) for text in texts[k : k + 100]] for k in range(0, 600, 100)]
    found = [text for part in template.render_parts(parts) for text in part]
    assert [n for n, text in enumerate(found) if isinstance(text, Failed)] == [30, 501]
    assert [text for text in found if not isinstance(text, Failed)] == [
        text for text in texts if "bad" not in text
    ]


def test_a_template_that_is_bad_on_many_rows_is_given_up() -> None:
    template = bad_on_some("{{ messages[0].content * 10**9 }}")
    asked = [conversation(f"bad {n}") for n in range(1000)]
    with pytest.raises(ConfigError, match=r"goes past its limits on \d+ prompts .*512 MiB"):
        template.render(asked)
    assert Template(PLAIN, {}).render([conversation("y")]) == ["y"]


def test_a_template_that_is_slow_on_all_rows_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not when the part is done, which would take a second a row."""
    monkeypatch.setattr(templates, "MOST_SPENT", 2)
    template = Template(HOSTILE["loops for ever"] + PLAIN, {})
    with pytest.raises(ConfigError, match=r"goes past its limits on 3 prompts .*more than 1 s"):
        template.render([conversation(f"{n}") for n in range(300)])


# The process itself.


def test_a_process_that_is_killed_costs_no_row() -> None:
    asked = [conversation(f"{n}") for n in range(300)]
    parts = [asked[k : k + 10] for k in range(0, 300, 10)]
    found = []
    for number, part in enumerate(Template(PLAIN, {}).render_parts(parts)):
        if number % 7 == 0:
            os.kill(templates._process._popen.pid, signal.SIGKILL)  # type: ignore[union-attr]
        found += part
    assert found == [f"{n}" for n in range(300)]


def test_what_is_not_read_to_the_end_is_not_taken_for_the_next_answer() -> None:
    parts = [[conversation(f"{n}")] for n in range(10)]
    rendered = Template(PLAIN, {}).render_parts(parts)
    assert next(rendered) == ["0"]
    rendered.close()
    assert Template(PLAIN, {}).render([conversation("next")]) == ["next"]


def test_large_parts_go_both_ways_at_once() -> None:
    texts = [f"{n}" + "ü" * 300_000 for n in range(12)]
    parts = [
        [conversation(a), conversation(b)] for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]
    found = [text for part in Template(PLAIN, {}).render_parts(parts) for text in part]
    assert found == texts


def test_a_forked_child_has_a_process_of_its_own() -> None:
    pid = child_pid()
    forked = os.fork()
    if not forked:  # in the child: no assertion may reach pytest
        fine = False
        try:
            fine = child_pid() != pid
        finally:
            os._exit(0 if fine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
    assert child_pid() == pid


def wait_until_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # dead; whoever adopted it has not looked yet
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[str]]:
    """Another interpreter that has started its process, and holds locks and a socket."""
    script = """
        import socket, sys, time
        from pathlib import Path
        from stages.artifacts import locks
        from stages.data import templates
        ours, theirs = socket.socketpair()
        with locks.hold(Path(sys.argv[1]), "it"):
            template = templates.Template("{{ 1 }}", {})
            assert template.render([[{"role": "user", "content": ""}]]) == ["1"]
            print(templates._process._popen.pid, flush=True)
            if sys.stdin.readline() == "loop\\n":
                print("looping", flush=True)
                template = templates.Template("{{ 9 ** (9 ** (messages | length + 8)) }}", {})
                template.render([[{"role": "user", "content": ""}]])
        """
    lock = f"/tmp/spin-template-owner-{os.getpid()}.lock"
    popen = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), lock],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield popen
    popen.kill()
    popen.wait()
    Path(lock).unlink()


@pytest.mark.parametrize("work", ["nothing", "loop"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_with_its_owner(
    owner: subprocess.Popen[str], number: int, work: str
) -> None:
    assert owner.stdin is not None
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    if work == "loop":
        owner.stdin.write("loop\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "looping\n"
        time.sleep(0.2)
    owner.send_signal(number)
    owner.wait()
    assert wait_until_gone(child)


def test_the_process_ends_when_its_owner_is_done(owner: subprocess.Popen[str]) -> None:
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    owner.communicate("\n")
    assert owner.returncode == 0
    assert wait_until_gone(child)


def test_the_process_holds_neither_locks_nor_sockets_nor_secrets(
    owner: subprocess.Popen[str],
) -> None:
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    kinds = {str(path.readlink()).split(":")[0] for path in Path(f"/proc/{child}/fd").iterdir()}
    assert kinds == {"pipe"}
    variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    names = {entry.split(b"=")[0].decode() for entry in variables if entry}
    assert names <= set(templates._VARIABLES)


def test_the_process_loads_next_to_nothing() -> None:
    script = "import sys, stages.data.template_child; print(*sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "transformers", "numpy", "pyarrow", "pydantic"}


def test_a_process_that_cannot_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "broken.py"
    program.write_text("import no_such_library")
    monkeypatch.setattr(templates, "PROGRAM", program)
    process = templates._Process()
    with pytest.raises(RuntimeError, match="did not start: .*No module named 'no_such_library'"):
        list(process.render([templates._Part(Template(PLAIN, {}), [conversation("x")], ask=True)]))
    process.close()
