"""The report in a real browser: what it asks for, shows and finds, and the way by keyboard."""

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[dev]'")

from playwright.sync_api import Browser, Page, expect
from typer.testing import CliRunner

from scripts.chromium import REMEDY, find_chromium, open_chromium, open_report, wait_until
from spin_cli.app import app
from stages.layout import RunLayout
from stages.report import write_report
from tests.hostile import hostile_texts
from tests.made_samples import Sample, write_samples
from tests.tiny_loop import RECIPE

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=REMEDY)

CHECKS = (Path(__file__).parent / "checks.js").read_text(encoding="utf-8")
NARROW, WIDE = (360, 780), (1400, 900)
ways = pytest.mark.parametrize(
    ("size", "theme"), [(WIDE, "light"), (NARROW, "dark")], ids=["wide-light", "narrow-dark"]
)
"""Two screens that differ in both, each of which may hide a control or fade a mark."""
WATCH = """
window.__violations = [];
document.addEventListener("securitypolicyviolation", (event) =>
  window.__violations.push(`${event.violatedDirective}: ${event.blockedURI}`));
"""
# What a page with hostile texts would do, if any of them were more than text.
ATTACKS = (
    "<script>window.__hacked = 1</script>",
    "</script><script>window.__hacked = 2</script>",
    "<img src=x onerror='window.__hacked = 3'>",
    "<svg onload=alert(4)><style>*{display:none}</style>",
    "<a href='javascript:window.__hacked = 5'>x</a><iframe src='http://192.0.2.1/'></iframe>",
    "{{ 7*7 }} ${window.__hacked = 6} <!-- <script>",
    "\u202egnisrever\u202c \u2067rtl\u2069 \u200e\u200f",
    "".join(chr(code) for code in range(32)) + "\x7f\x85\x9b31m",
    "e" + "\u0301" * 100_000,
    "x" * 100_000,
    "\n" * 3_000,
    "W" + "\u0489\u0301\u0302" * 30,
    "﷽" * 200,
    "\u2028\u2029\ufeff\u200b\u00ad",
)


@dataclass
class Opened:
    """A report that is open, and what it did."""

    page: Page
    path: Path
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def offences(self) -> list[str]:
        """What no report may do."""
        asked = [u for u in self.requests if not u.startswith(("data:", self.path.as_uri()))]
        violations = self.page.evaluate("window.__violations")
        hacked = self.page.evaluate("window.__hacked === undefined ? [] : [window.__hacked]")
        return [*self.console, *asked, *self.dialogs, *violations, *hacked]

    def ids(self) -> list[str]:
        """The first letters of the prompt ids of the samples that are shown."""
        return self.page.locator("article h3 code").all_inner_texts()

    def status(self) -> str:
        return self.page.locator("#samples-status").inner_text()

    def choose(self, name: str, value: str) -> None:
        self.page.select_option(f"#samples-{name}", value)

    def focused(self) -> int | None:
        """The place of the sample that has the focus."""
        found = self.page.evaluate("document.activeElement.dataset.place ?? null")
        return None if found is None else int(found)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Any]:
    """Opens a report in a fresh profile; what it did until the end of the test is checked there."""
    all_opened: list[Opened] = []

    def open_(
        path: Path, size: tuple[int, int] = WIDE, theme: str = "light", at: str = ""
    ) -> Opened:
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=theme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )  # fmt: skip
        context.set_default_timeout(20_000)
        context.add_init_script(WATCH)
        page = context.new_page()
        it = Opened(page, path)
        page.on("console", lambda message: it.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: it.console.append(str(error)))
        page.on("request", lambda request: it.requests.append(request.url))
        page.on("dialog", lambda dialog: (it.dialogs.append(dialog.message), dialog.dismiss()))
        open_report(page, path.as_uri() + at)
        all_opened.append(it)
        return it

    yield open_
    for it in all_opened:
        assert it.offences() == []
        it.page.context.close()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A true run of two iterations."""
    folder = tmp_path_factory.mktemp("played")
    (folder / "tiny.yaml").write_text(RECIPE)
    words = ("run", folder / "tiny.yaml", "--run", folder / "run", "--iterations", "2", "--quiet")
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return folder / "run"


def with_samples(played: Path, run: Path, samples: list[Sample], start: list[Sample]) -> Path:
    """Write the report of a copy of a true run that has these held-out samples."""
    shutil.copytree(played, run)
    layout = RunLayout(run)
    for place in (layout.data, layout.start_evaluation, layout.stage(1, "evaluate")):
        shutil.rmtree(place)
    shutil.rmtree(layout.stage(0, "evaluate"))
    write_samples(run, {None: start, 1: samples})
    out = run.parent / "report.html"
    written = write_report(run, out)
    assert written.problems == ()
    return out


def known_samples(count: int) -> list[Sample]:
    """Samples whose order by anything is known: every third has a needle."""
    return [
        Sample(
            prompt=f"Question {i}: " + "how many? " * 5,
            human=f"The answer is {i}. #### {i}",
            player=f"The ANSWER might be {i + i % 2}. #### {i + i % 2}" + " Needle." * (i % 3 == 0),
            opponent=f"The answer is {i + 1}. #### {i + 1}",
            greedy=f"greedy {i}",
            player_reward=float(i % 2 == 0),
            opponent_reward=float(i % 5 == 0),
            margin=((i * 37) % 101 - 50) / 10,
            cut_off=i % 7 == 0,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def true_report(played: Path) -> Path:
    out = played.parent / "report.html"
    write_report(played, out)
    return out


@pytest.fixture(scope="module")
def known(played: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    """A report of 60 samples, and these in the order of their ids."""
    samples = known_samples(60)
    run = tmp_path_factory.mktemp("known") / "run"
    return (
        with_samples(played, run, samples, samples[:5]),
        sorted(samples, key=lambda s: s.prompt_id),
    )


@pytest.fixture(scope="module")
def hostile(played: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose every text is an attack, its run's name too."""
    attacks = [*ATTACKS, *(t.encode("utf-8", "replace").decode() for t in hostile_texts(40, 7))]
    samples = [
        Sample(f"{i} {t}", t, t + " player", opponent=f"opponent {t}", greedy=t, system=t)
        for i, t in enumerate(attacks)
    ]
    run = tmp_path_factory.mktemp("hostile") / "run<img src=x onerror=alert(1)>&amp;\u202e"
    return with_samples(played, run, samples, samples)


@pytest.fixture(scope="module")
def large(played: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 10,000 samples of a few hundred words each."""
    random_ = random.Random(0)
    words = [f"{a}{b}" for a in "aeioubcdfghklmnprst" for b in ("lor", "sit", "dolen", "am", "et")]

    def text() -> str:
        return " ".join(random_.choices(words, k=random_.randrange(20, 120)))

    samples = [
        Sample(f"{i} {text()}", text(), text(), opponent=text(), margin=random_.gauss(0, 1),
               player_reward=random_.random(), opponent_reward=random_.random())
        for i in range(10_000)
    ]  # fmt: skip
    run = tmp_path_factory.mktemp("large") / "run"
    return with_samples(played, run, samples, samples[:10])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_the_page_asks_for_nothing_and_is_accessible(
    opened: Any, true_report: Path, size: tuple[int, int], theme: str
) -> None:
    it = opened(true_report, size, theme)
    assert it.page.evaluate(CHECKS) == []
    it.page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    assert it.page.evaluate(CHECKS) == []
    assert it.requests == [true_report.as_uri()] or it.requests[1:] == ["data:,"]


def test_the_checks_find_what_is_wrong(opened: Any, true_report: Path) -> None:
    it = opened(true_report)
    it.page.evaluate("""() => {
      const add = (tag, changes) => document.querySelector("main").append(
        Object.assign(document.createElement(tag), changes));
      add("h5", { textContent: "deep" });
      add("button", {});
      add("p", { textContent: "faint", id: "samples" });
      document.querySelector("main > p").style.color = "rgb(128 128 128 / 60%)";
      add("div", { id: "broad", textContent: "broad" });
      document.getElementById("broad").style.width = "3000px";
      document.querySelector("article").setAttribute("aria-labelledby", "nowhere");
    }""")
    wrong = "\n".join(it.page.evaluate(CHECKS))
    for part in ("heading level 5", "no name: button", "id twice: samples", "contrast", "wide",
                 "aria-labelledby names no element: nowhere"):  # fmt: skip
        assert part in wrong
    it.page.evaluate("fetch('http://192.0.2.1/').catch(() => 0)")
    wait_until(it.page, "window.__violations.length > 0")
    assert it.offences(), "a request that the policy stops is an offence"
    it.page.evaluate("window.__violations = []")
    it.console.clear()
    it.requests.clear()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [NARROW, WIDE], ids=["narrow", "wide"])
def test_hostile_texts_stay_texts(
    opened: Any, hostile: Path, size: tuple[int, int], theme: str
) -> None:
    it = opened(hostile, size, theme)
    it.choose("size", "100")
    it.page.check("#samples-greedy", force=True)
    it.page.check("#samples-missing", force=True)
    assert it.page.evaluate(CHECKS) == []
    kinds = it.page.evaluate("""[...new Set([...document.querySelectorAll(".sample-body *")]
                                .map((node) => node.tagName))].sort()""")
    assert set(kinds) <= {"DEL", "EM", "INS", "MARK"}
    texts = it.page.locator(".sample-body").all_text_contents()
    assert any("<script>window.__hacked = 1</script>" in text for text in texts)
    assert any("⟨U+202E⟩gnisrever⟨U+202C⟩" in text for text in texts)
    assert any("␀␁" in text and "⟨U+009B⟩31m" in text for text in texts)
    odd = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
    assert not [text for text in texts if odd.search(text)]
    assert max(map(len, texts)) < 50_000
    for button in it.page.locator(".sample-more:visible").all()[:6]:
        button.click()
    assert it.page.evaluate(CHECKS) == []


@ways
def test_samples_are_sorted_by_what_is_chosen(
    opened: Any, known: tuple[Path, list[Sample]], size: tuple[int, int], theme: str
) -> None:
    path, samples = known
    it = opened(path, size, theme)
    it.choose("size", "100")
    gain = lambda s: s.player_reward - s.opponent_reward  # noqa: E731
    for key, value in (
        ("prompt", lambda s: 0), ("margin-high", lambda s: -s.margin),
        ("margin-low", lambda s: s.margin), ("reward-low", lambda s: s.player_reward),
        ("gain-high", lambda s: -gain(s)), ("length-high", lambda s: -len(s.player.split())),
    ):  # fmt: skip
        it.choose("sort", key)
        assert it.ids() == [s.prompt_id[:8] for s in sorted(samples, key=value)], key
    assert it.page.evaluate(CHECKS) == []


@ways
def test_search_finds_every_text_marks_it_and_tells_how_many(
    opened: Any, known: tuple[Path, list[Sample]], size: tuple[int, int], theme: str
) -> None:
    path, samples = known
    it = opened(path, size, theme)
    it.page.fill("#samples-search", "nEEdle.")
    expect(it.page.locator("#samples-status")).to_have_text(
        "20 of 60 samples found; 1 to 20 shown."
    )
    assert it.page.locator("#samples-status[aria-live=polite]").count() == 1
    assert set(it.page.locator("article mark").all_inner_texts()) == {"Needle."}
    assert it.ids() == [s.prompt_id[:8] for s in samples if "Needle" in s.player]
    assert it.page.evaluate(CHECKS) == [], "what is found can be read"
    for query, found in (
        ("question 7:", 1), (".*", 0), ("greedy 33", 1), (samples[3].prompt_id, 1),
        ("answer is 12.", 2), ("", 60),
    ):  # fmt: skip
        it.page.fill("#samples-search", query)
        expect(it.page.locator("#samples-status")).to_contain_text(
            f"{found} of 60 samples found" if found < 60 else "60 samples;"
        )


def test_filters_show_what_they_say_and_how_many(
    opened: Any, known: tuple[Path, list[Sample]]
) -> None:
    path, samples = known
    it = opened(path)
    it.choose("size", "100")
    gains = {s.prompt_id[:8]: s.player_reward - s.opponent_reward for s in samples}  # type: ignore[operator]
    for name, key, wanted in (
        ("versus", "won", {i for i, gain in gains.items() if gain > 0}),
        ("versus", "lost", {i for i, gain in gains.items() if gain < 0}),
        ("versus", "tied", {i for i, gain in gains.items() if gain == 0}),
        ("versus", "fooled", {s.prompt_id[:8] for s in samples if s.margin < 0}),
        ("only", "right", {s.prompt_id[:8] for s in samples if s.player_reward == 1}),
        ("only", "wrong", {s.prompt_id[:8] for s in samples if s.player_reward == 0}),
        ("only", "cut", {s.prompt_id[:8] for s in samples if s.cut_off}),
        ("only", "identical", set[str]()),
    ):
        it.choose(name, key)
        assert set(it.ids()) == wanted, key
        label = it.page.locator(f"#samples-{name} option[value={key}]").inner_text()
        assert label.endswith(f"({len(wanted)})")
        it.choose(name, "any")


def test_other_evaluations_open_and_offer_what_they_have(
    opened: Any, known: tuple[Path, list[Sample]]
) -> None:
    it = opened(known[0])
    assert it.page.locator("#samples-evaluation option").all_inner_texts() == [
        "Start", "Iteration 1",
    ]  # fmt: skip
    it.choose("sort", "length-high")
    it.choose("evaluation", "start")
    expect(it.page.locator("#samples-status")).to_contain_text("5 samples")
    assert it.page.locator("#samples-sort").input_value() == "length-high", "the choice stays"


def test_marked_words_are_those_that_differ(opened: Any, known: tuple[Path, list[Sample]]) -> None:
    """Without what is added it reads like the human answer, without what is missing as it is."""
    path, samples = known
    it = opened(path)
    it.choose("size", "100")
    it.page.check("#samples-missing")
    shown = it.page.evaluate("""[...document.querySelectorAll("article")].map((node) =>
      ["player", "opponent"].map((who) => ["ins", "del"].map((tag) => {
        const body = node.querySelector(`.sample-${who} .sample-body`).cloneNode(true);
        for (const part of body.querySelectorAll(tag)) part.remove();
        return body.textContent;
      })))""")
    assert shown == [[[s.human, s.player], [s.human, s.opponent]] for s in samples]
    marked = it.page.locator("article").nth(0).locator(".sample-opponent ins").all_inner_texts()
    number = re.findall(r"\d+", samples[0].opponent or "")[0]
    assert marked == [number, number]


def test_a_link_opens_its_sample_on_whatever_page_it_is(
    opened: Any, known: tuple[Path, list[Sample]]
) -> None:
    path, samples = known
    it = opened(path, at=f"#sample/1/{samples[41].prompt_id}")
    assert it.focused() == 41
    assert "26 to 50 shown" in it.status()
    it.page.fill("#samples-search", "no such text")
    expect(it.page.locator("#samples-status")).to_contain_text("0 of 60")
    it.page.evaluate(f"location.hash = '#sample/1/{samples[2].prompt_id}'")
    wait_until(it.page, "document.activeElement.dataset.place === '2'")
    assert it.page.locator("#samples-search").input_value() == "", "what hid it is gone"
    link = it.page.locator("article a").nth(4)
    link.click()
    wait_until(it.page, "document.activeElement.dataset.place === '4'")
    assert it.page.url.endswith(f"#sample/1/{samples[4].prompt_id}")


def test_all_can_be_done_by_keyboard(opened: Any, known: tuple[Path, list[Sample]]) -> None:
    it = opened(known[0])
    press = it.page.keyboard.press
    press("/")
    assert it.page.evaluate("document.activeElement.id") == "samples-search"
    it.page.keyboard.type("a/b")
    assert it.page.locator("#samples-search").input_value() == "a/b"
    it.page.fill("#samples-search", "question")
    press("Enter")
    assert it.focused() == 0
    it.page.wait_for_timeout(200)
    assert it.focused() == 0, "the search that waited for more letters takes the focus away"
    for key, place in (
        ("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("PageDown", 25), ("ArrowUp", 24),
        ("ArrowDown", 25), ("End", 59), ("ArrowDown", 59), ("PageUp", 25), ("Home", 0),
        ("ArrowUp", 0),
    ):  # fmt: skip
        press(key)
        assert it.focused() == place, key
        box = it.page.evaluate("document.activeElement.getBoundingClientRect().toJSON()")
        assert -1 <= box["top"] < WIDE[1], f"{key}: the sample is out of sight"
    press("Tab")
    assert it.page.evaluate("document.activeElement.matches('article h3 a')")
    press("Tab")
    assert it.page.evaluate("document.activeElement.textContent") == "Copy"
    setsize = it.page.locator("article").first.get_attribute("aria-setsize")
    assert setsize == "60"


def test_focus_goes_through_the_page_in_its_order_and_is_seen(
    opened: Any, true_report: Path
) -> None:
    it = opened(true_report)
    it.page.evaluate("window.__before = null")
    stops = []
    for _ in range(40):
        it.page.keyboard.press("Tab")
        stop = it.page.evaluate("""() => {
          const [node, before] = [document.activeElement, window.__before];
          window.__before = node;
          const style = getComputedStyle(node);
          const follows = !before || before.compareDocumentPosition(node) & 4;
          const seen = parseFloat(style.outlineWidth) > 0 && style.outlineStyle !== "none";
          return [node.className || node.id || node.tagName, Boolean(follows), seen];
        }""")
        stops.append(stop)
    assert stops[0][0] == "skip"
    assert [s for s in stops if not s[1] or not s[2]] == []


def test_a_sample_is_copied_as_it_is(opened: Any, known: tuple[Path, list[Sample]]) -> None:
    path, samples = known
    it = opened(path)
    it.page.evaluate("""Object.defineProperty(navigator, "clipboard", {
      value: { writeText: async (text) => { window.__copied = text; } } })""")
    it.page.locator("article button", has_text="Copy").first.click()
    expect(it.page.locator("#samples-said")).to_have_text("Copied.")
    copied = it.page.evaluate("window.__copied")
    for text in (samples[0].prompt, samples[0].human, samples[0].player, samples[0].opponent):
        assert text in copied


def test_newer_samples_of_a_served_page_leave_the_reader_where_he_is(
    opened: Any, known: tuple[Path, list[Sample]], large: Path
) -> None:
    it = opened(known[0])
    it.page.fill("#samples-search", "needle")
    expect(it.page.locator("#samples-status")).to_contain_text("20 of 60")
    before = it.ids()
    html = re.sub(r'"name":"1"', '"name":"2"', large.read_text("utf-8")).replace(
        "samples-of-1", "samples-of-2")  # fmt: skip
    taken = it.page.evaluate(
        """(html) => {
          const fresh = new DOMParser().parseFromString(html, "text/html");
          const section = fresh.getElementById("samples");
          return !document.dispatchEvent(
            new CustomEvent("spin:samples", { cancelable: true, detail: { section } }));
        }""",
        html.replace("Iteration 1", "Iteration 2"),
    )
    assert taken, "the page would ask the reader to load it again"
    expect(it.page.locator("#samples-evaluation option")).to_have_text(["Start", "Iteration 2"])
    assert it.ids() == before
    it.page.fill("#samples-search", "")
    it.choose("evaluation", "2")
    expect(it.page.locator("#samples-status")).to_contain_text("10,000 samples")


def test_ten_thousand_samples_open_within_two_seconds(
    opened: Any, large: Path, record_property: Any
) -> None:
    """From the start of the navigation to a page that answers; of all times the best of three."""
    ready = "performance.getEntriesByName('samples-ready')[0].startTime"
    times = []
    for _ in range(3):
        it = opened(large)
        times.append(it.page.evaluate(ready))
    assert "10,000 samples" in it.status()
    it.page.evaluate("""() => {
      window.__took = (id, event, value) => new Promise((done) => {
        const begun = performance.now();
        new MutationObserver(() => done(performance.now() - begun)).observe(
          document.getElementById("samples-list"), { childList: true });
        const node = document.getElementById(id);
        node.value = value;
        node.dispatchEvent(new Event(event));
      });
    }""")
    took = "([id, event, value]) => window.__took(id, event, value)"
    sorted_ms = min(
        it.page.evaluate(took, ["samples-sort", "change", order])
        for order in ("margin-high", "reward-low", "gain-high")
    )
    search_ms = min(
        it.page.evaluate(took, ["samples-search", "input", query])
        for query in ("csit edolen", "dlor aet", "alor bsit")
    )
    assert re.search(r"[\d,]+ of 10,000 samples found", it.status())
    figures = {"open_ms": min(times), "sort_ms": sorted_ms, "search_ms": search_ms,
               "size_bytes": large.stat().st_size}  # fmt: skip
    for name, value in figures.items():
        record_property(name, round(value))
    print(figures)  # noqa: T201
    assert min(times) < 2000
    assert max(sorted_ms, search_ms) < 1000
