"""report.html in a real browser: it opens from disk alone, steps, links, fits, and shows text as text."""

import json
import os
import re
from html.parser import HTMLParser

import pytest
from browser import CHROMIUM, Browser
from synthetic import make_run, memory_rows, qa_rows, reading, search_rows, write_readings

from eval.report.page import write_report

needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")
HOSTILE = [
    "</script><script>alert(1)</script>", "<!--<script>", "<img src=x onerror=alert(2)>", "'\"><svg/onload=alert(3)>",
    "{{ 7*7 }}{% raw %}", "javascript:alert(4)", "&lt;b&gt; &amp; \u2028 \u202e reversed \x1b[31m", "__proto__",
    "$x^2$",
]
MEASURED = "document.documentElement.scrollWidth <= innerWidth"


def hostile_run(folder):
    """Every text that comes from outside is hostile."""
    text = " ".join(HOSTILE)
    document = reading(0, 3, systems=("base", "memtrain", *HOSTILE))
    document |= {"question": text, "answers": [text], "kind": text, "task": text, "id": text, "marks": [text],
                 "sections": [f"{text} {k}" for k in range(3)], "gold": [f"{text} 1", HOSTILE[0]]}
    for name in document["systems"]:
        document["systems"][name] = {"memories": [f"{text} {k}." for k in range(3)], "answer": text, "correct": 1}
    rows = qa_rows()
    for row in rows:
        row["kinds"] = {piece: [1, 2] for piece in HOSTILE}
    stage = {"name": text, "seed": 0, "steps": 1, "seconds": 1.0}
    folder = make_run(folder, long_qa=rows, stages=[stage], claims_note=text, search_qa=search_rows(benchmarks=HOSTILE),
                      environment={"device": text, "command": text, "commit": text, text: text},
                      config={"preset": text, "corpus": text, "model": text})
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": text, "step": 1, "reward": 0.5}) + "\n")
    write_readings(folder, [document])
    return folder, text


class Outline(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A run with everything: two arms, search, memories, documents of 5 to 45 sections."""
    folder = tmp_path_factory.mktemp("html")
    run = make_run(folder / "full", search_qa=search_rows(), memory=memory_rows())
    write_readings(run, [reading(0, 5), reading(1, 45), reading(2, 5, systems=("base", "memagent"))])
    arm = make_run(folder / "e2e", 0, {"recall_group": 0})
    write_report(run, [arm], folder / "out")
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, page):
    """opened(hash, ...): the page anew, and no problem by the end of the test."""
    browser.problems.clear()
    yield lambda at="", **view: browser.open(page.as_uri() + at, **view)
    assert browser.problems == []


# ------------------------------------------------------------------------------------------------ without a browser


def test_it_refers_to_nothing_outside_itself(page):
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    for tag, attributes in outline.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:,", "data:image/")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on")], "no handlers in the markup"
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert [a.get("type") for tag, a in outline.tags if tag == "script"] == ["application/json", None]
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    links = {a["href"][1:] for tag, a in outline.tags if tag == "a"}
    assert links <= set(ids), "every link inside the page leads somewhere"
    assert len(ids) == len(set(ids))


def test_it_holds_every_part(page):
    text = page.read_text(encoding="utf-8")
    for part in ("C1 MemTrain over base, average", "C8 it holds for more than one backbone", "79.69", "55.63",
                 "end-to-end", "verbatim", "abc1234", "python memtrain.py --run full",
                 "Not run: it needs the arms of --scaling."):
        assert part in text, part
    assert re.findall(r'<img src="data:image/([a-z+]+);base64,', text) == ["svg+xml", "png"]


def test_a_run_without_readings_says_so(tmp_path):
    write_report(make_run(tmp_path / "r", metrics=False, stages=[]))
    text = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "Not run: there is no readings.json" in text and "<script" not in text
    assert "there are no curves" in text and "No stage was recorded" in text


def test_hostile_text_adds_no_element(tmp_path):
    """The page of a hostile run has the elements that a harmless one has."""
    folder, _ = hostile_run(tmp_path / "r")
    write_report(folder)
    outline = Outline((folder / "report.html").read_text(encoding="utf-8"))
    risky = {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert {tag for tag, _ in outline.tags} & risky == {"script", "img"}
    assert all(a["src"].startswith("data:image/") for tag, a in outline.tags if tag == "img")
    assert sum(tag == "script" for tag, _ in outline.tags) == 2
    assert all(not name.startswith("on") for _, attributes in outline.tags for name in attributes)


# ------------------------------------------------------------------------------------------------ in a browser


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_is_silent(opened, browser, width, dark):
    opened(width=width, dark=dark)
    assert browser.run(MEASURED)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run(MEASURED), "with everything unfolded, too"
    for _ in range(7):
        browser.run("document.getElementById('v-next').click()")
        assert browser.run(MEASURED)
    light = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] > 128")
    assert light != dark
    assert browser.run("[...document.querySelectorAll('figure img')].every(i => i.naturalWidth > 500)")


@needs_browser
def test_arrows_step_and_the_link_follows(opened, browser):
    opened()
    where = "[document.getElementById('v-where').textContent, location.hash].join(' ')"
    browser.run("document.getElementById('viewer').focus()")
    browser.press("ArrowRight")
    assert browser.run(where) == "Section 2 of 5 #read/1/2/base/memtrain"
    for _ in range(9):
        browser.press("ArrowRight")
    assert browser.run(where) == "After the last section #read/1/6/base/memtrain", "it ends at the answer"
    assert browser.run("document.getElementById('v-next').disabled")
    assert browser.run("document.getElementById('v-pane-a').textContent").startswith("BaseAnswer, from the last")
    browser.press("ArrowLeft")
    assert browser.run(where).startswith("Section 5 of 5")
    browser.press("ArrowDown")
    assert browser.run(where) == "Section 1 of 45 #read/2/1/base/memtrain"
    browser.press("ArrowUp")
    browser.press("ArrowUp")
    assert browser.run(where) == "Section 1 of 5 #read/1/1/base/memtrain"
    browser.press("Escape")
    before = browser.run(where)
    browser.press("ArrowDown")
    assert browser.run(where) == before, "outside the viewer, up and down scroll the page"


@needs_browser
@pytest.mark.parametrize(("link", "where", "systems"), [
    ("#read/2/45/memagent/memtrain%2Bmemagent", "Section 45 of 45", "memagent,memtrain+memagent"),
    ("#read/3/6/base/memtrain", "After the last section", "base,memagent"),  # this document has no memtrain
    ("#read/99/99/x/y", "After the last section", "base,memagent"), ("#read/-1/x", "Section 1 of 5", "base,memtrain"),
    ("#read/%E0%A4%A/2", "Section 1 of 5", "base,memtrain"), ("#read/1/3", "Section 3 of 5", "base,memtrain")])
def test_links_lead_to_a_step(opened, browser, link, where, systems):
    opened(link)
    assert browser.run("document.getElementById('v-where').textContent") == where
    assert browser.run("['a', 'b'].map(x => document.getElementById('v-' + x).value).join()") == systems
    if "%E0" not in link:
        assert browser.run("document.getElementById('viewer').getBoundingClientRect().top < innerHeight / 2")


@needs_browser
def test_a_link_on_the_page_and_the_systems_can_be_chosen(opened, browser):
    opened("#read/1/3/base/memtrain")
    browser.run("location.hash = '#read/2/4/memagent/base'; new Promise(done => setTimeout(done, 100))")
    assert browser.run("document.getElementById('v-where').textContent") == "Section 4 of 45"
    browser.run("(() => { const b = document.getElementById('v-b'); b.value = 'memtrain';"
                " b.dispatchEvent(new Event('change')); })()")
    assert browser.run("location.hash") == "#read/2/4/memagent/memtrain"
    assert browser.run("document.querySelector('#v-pane-b h4').textContent") == "+ MemTrain"
    browser.run("document.querySelectorAll('#v-track button')[9].click()")
    assert browser.run("document.getElementById('v-where').textContent") == "Section 10 of 45"


@needs_browser
def test_memories_and_facts_are_marked(opened, browser):
    """Step 5 of a synthetic document: the first system holds two gold facts and drops the oldest."""
    opened("#read/1/5/base/memtrain")
    said = browser.run("""Object.fromEntries(['a', 'b'].map(x => [x, ['kept', 'added', 'dropped'].map(c =>
        [...document.querySelectorAll(`#v-pane-${x} .mem .${c}`)].map(e => e.textContent))]))""")
    facts = ["[MASK] was the home town of Oren Valdis 0.", "Oren Valdis 0 wrote chapter 3 of the atlas.",
             "Oren Valdis 0 wrote chapter 5 of the atlas."]
    assert said["a"][0] == [facts[1], facts[1]], "kept: before and after"
    assert said["a"][2][0] == facts[0] and said["a"][1][0] == facts[2]
    assert said["b"][0] == facts[:2] * 2 and said["b"][1][0] == facts[2] and facts[0] not in said["b"][2]
    gold = "[...document.querySelectorAll('#v-text .gold')].map(e => e.textContent).join('')"
    assert browser.run(gold) == facts[2]
    assert browser.run("document.querySelector('#v-text .mark').textContent") == "Oren Valdis 0"
    full = "[...document.querySelectorAll('#v-track .held')].map(row => row.children[4].firstChild.style.height)"
    assert browser.run(full) == ["66.6667%", "100%"], "gold facts held: two of three, all three"


@needs_browser
def test_hostile_text_is_shown_as_text(tmp_path, browser):
    folder, text = hostile_run(tmp_path / "r")
    write_report(folder)
    browser.problems.clear()
    browser.open((folder / "report.html").as_uri() + "#read/1/2/__proto__/base", width=400)
    assert browser.run("document.getElementById('v-text').textContent") == f"{text} 1"
    assert browser.run("document.getElementById('v-q').textContent") == text
    assert browser.run("document.getElementById('v-a').value") == "__proto__"
    assert browser.run("document.querySelector('#v-pane-a h4').textContent") == "__proto__"
    for _ in range(3):
        browser.press("ArrowRight")
    assert browser.run("document.querySelector('#v-pane-b .answer').textContent") == text
    assert browser.run("document.querySelectorAll('script').length") == 2
    hostile = "#viewer img, iframe, #viewer script, [onload], [onerror]"
    assert browser.run(f"document.querySelectorAll('{hostile}').length") == 0
    assert browser.run(MEASURED) and browser.problems == []


@needs_browser
def test_forty_documents_open_in_a_second(tmp_path, browser):
    """Documents of 32 sections of 160 tokens and more, four systems; the best of three. On a machine with other work
    the time that the page itself took counts."""
    folder = make_run(tmp_path / "r", search_qa=search_rows(), memory=memory_rows())
    write_readings(folder, [reading(i, 32, size=20) for i in range(40)])
    write_report(folder)
    page = folder / "report.html"
    assert 1e6 < page.stat().st_size < 10e6
    browser.call("Performance.enable")
    times, own = [], []
    for _ in range(3):
        times.append(browser.open(page.as_uri() + "#read/40/32"))
        own += [x["value"] for x in browser.call("Performance.getMetrics")["metrics"] if x["name"] == "ThreadTime"]
    assert browser.run("document.getElementById('v-where').textContent") == "Section 32 of 32"
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    assert 0 < min(own) < 1 and (busy or min(times) < 1), (times, own)
