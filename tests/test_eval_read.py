"""Reading a file with a memory, and taking a run's result elsewhere: the commands read and export."""

import io
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from conftest import TINY

import memtrain
from data import InputError
from data.tasks import split_sections
from eval.read import HTML, lines_of, visible
from memtrain import main

ROOT = Path(memtrain.__file__).parent
TEXT = "\n".join(f"{name} Tellin: {name} Tellin was born in {1700 + i}." for i, name in enumerate(
    ["Joren", "Mara", "Oskel", "Vukin", "Kigon", "Foves", "Kuran", "Bruru"] * 5))


def read(capsys, *argv: str) -> str:
    assert main(["read", *argv, "--threads", "1"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_shipped_model_reads_a_file_section_by_section(folder, capsys, tokenizer):
    Path("t.txt").write_text(TEXT)
    shown = read(capsys, "t.txt", "--question", "When was Mara Tellin born?", "--out", "out/memories.json")
    cut = split_sections(TEXT.split("\n"), tokenizer, memtrain.Config.section)
    *memories, answer = json.loads(Path("out/memories.json").read_text())
    assert [(m["section"], m["tokens"]) for m in memories] == [(i, len(s)) for i, s in enumerate(cut, 1)]
    assert len(cut) > 3 and any(m["memory"] for m in memories)
    assert all(f"section {m['section']} ({m['tokens']} tokens):\n  {m['memory']}" in shown for m in memories)
    assert answer["question"] == "When was Mara Tellin born?" and f"answer: {answer['answer']}" in shown
    assert read(capsys, "t.txt", "--question", "When was Mara Tellin born?") == shown, "the same seed, the same reading"
    assert list(Path().iterdir()) != [] and not Path("runs").exists(), "reading starts no run"


def test_standard_input_ends_where_it_ends(folder, capsys, monkeypatch):
    Path("t.txt").write_text(TEXT)
    expected = read(capsys, "t.txt")
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(TEXT.encode()))))
    assert read(capsys, "-") == expected and "answer" not in expected


def test_an_interrupt_ends_the_reading_not_the_answer(folder, capsys, monkeypatch):
    Path("t.txt").write_text(TEXT)
    monkeypatch.setattr(memtrain.Interrupt, "asked", True)
    shown = read(capsys, "t.txt", "--question", "Who?", "--out", "o.json")
    assert "section 1" in shown and "section 2" not in shown and "answer:" in shown
    assert len(json.loads(Path("o.json").read_text())) == 2


def lines(folder: Path, content: bytes, name: str = "t.txt") -> list[str]:
    (folder / name).write_bytes(content)
    return lines_of(str(folder / name))[0]


def test_lines_of_a_text(folder):
    assert lines(folder, b"\xef\xbb\xbfa\r\n\r\n  b c \n\n\nd") == ["a", "b c", "d"]
    text = "é日👩" * 30_000  # pieces end within a character
    assert "".join(lines(folder, text.encode())) == text
    words = lines(folder, b"word " * 5000)
    assert len(words) > 3 and max(map(len, words)) <= 8192 and {w for x in words for w in x.split()} == {"word"}


def test_lines_of_html(folder):
    page = b"""<!DOCTYPE html><html><head><title>T</title><style>p{color:red}</style></head><body>
    <h1>Head<b>ing</b> &amp; more</h1><script>alert("x")</script><p>One<br>two &#233; &lt;b&gt;</p><!-- no -->
    <p>x</body>"""
    assert lines(folder, page) == ["Heading & more", "One", "two é <b>", "x"]
    assert lines(folder, b"plain <b>text</b> of a .txt") == ["plain <b>text</b> of a .txt"]
    assert lines(folder, b"<p>by its name", "t.html") == ["by its name"]


HEADS = {  # what stands before the body, in a file of which the name says nothing
    "no end of the head": "<!doctype html><html><head><meta charset=utf-8><title>No</title>",
    "no head at all": "<title>No</title>", "a head before html": "<head><script>no()</script></head><html>",
    "a comment": "<!-- saved from a site -->\n<!-- > --><html>", "blank lines": "\n\n  <HTML>",
    "XML's first line": '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE html PUBLIC "x" "y">\n<html xmlns="z">',
    "an instruction": '<?xml version="1.0"?>\n<?xml-stylesheet href="a.xsl"?><html>',
    "an element that ends itself": '<?xml version="1.0"?><html><head><title/><script src="a.js"/></head>',
}


@pytest.mark.parametrize("head", HEADS)
def test_html_is_seen_and_shown(head, folder, monkeypatch):
    page = (HEADS[head] + "<body><p>Ostrel <b>Mill</b><script>no()</script><p hidden>no</p><template>no</template>"
            "<p style='Display : none'>no<br></p><ul><li>1741<li>é日</ul></body></html>").encode()
    expected = ["Ostrel Mill", "1741", "é日"]
    assert lines(folder, page, "page") == lines(folder, page, "p.xhtml") == expected
    assert lines(folder, b"\xef\xbb\xbf" + page, "page") == lines(folder, page.decode().encode("utf-16")) == expected
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(page))))
    assert lines_of("-")[0] == expected


def test_other_markup_is_text(folder):
    for text in ("<?xml version='1.0'?><feed>", "<div>a readme", "<!-- a comment --> and text", "<headline>",
                 "%! is a sign", "{\\rt is none", "From: <a@b.c>"):
        assert lines(folder, text.encode()) == [text]


def test_utf_16_with_its_mark(folder):
    for coded in ("utf-16", "utf-32"):
        assert lines(folder, "Łódź\n\n日本\r\n".encode(coded)) == ["Łódź", "日本"]


def test_a_page_is_read_in_linear_time_or_refused():
    began = time.process_time()
    for unit in ("<p>One fact &amp; another.</p>", "<!--", "<?xml ", "&", "<a b='", "</p>"):
        shown = visible("t.html", unit * 100_000)
        HTML.match(unit * 10_000)
        assert shown.count("One fact & another.") == (100_000 if "fact" in unit else 0)
    assert "x" in visible("t.html", "<div>" * 2_000 + "x")
    with pytest.raises(InputError, match=r"t\.html: HTML with too many elements in each other"):
        visible("t.html", "<div>" * 3_000 + "x")
    assert time.process_time() - began < 10, "measured 1 s"


def test_standard_input_that_is_closed():
    """By the shell, so that Python has none."""
    done = subprocess.run(f"{sys.executable} memtrain.py read - --question Who? --threads 1 <&-", shell=True, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert "standard input is closed" in line


BAD = {  # file: content, parts of the answer
    "missing.txt": (None, ["missing.txt", "No such file"]), "empty.txt": (b"", ["empty.txt", "empty"]),
    "blank.md": (b" \n\t\n", ["blank.md", "empty"]), "binary.txt": (b"abc\0def", ["binary.txt", "NUL"]),
    "latin.txt": ("Montréal".encode("latin-1"), ["latin.txt", "UTF-8"]),
    "utf16.txt": ("Łódź".encode("utf-16-le"), ["utf16.txt", "UTF-16 with its mark"]),
    "void.html": (b"<html><title>No</title><body><script>x</script>&nbsp;</body>", ["void.html", "visible"]),
    "none.html": (b"", ["none.html", "empty"]), "unseen.txt": ("\u200b\n\u00ad".encode(), ["unseen.txt", "visible"]),
    "late.txt": (b" " * 70_000 + b"\n", ["late.txt", "visible"]), "z.gz": (b"\x1f\x8b\x08..", ["z.gz", "zcat"]),
    "marked.pdf": (b"\xef\xbb\xbf\n%PDF-1.7", ["marked.pdf", "pdftotext"]),
    "a.ps": (b"\x04%!PS-Adobe", ["a.ps", "PostScript"]), "b.ps": (b"%!\n/x 1 def", ["b.ps", "PostScript"]),
    "a.mhtml": (b"From: <Saved by Blink>\n", ["a.mhtml", "save the page as HTML"]),
    "a.rtf": (b"{\\rtf1 text}", ["a.rtf", "RTF"]), "nul.txt": (b"\n" * 70_000 + b"\0", ["nul.txt", "NUL"]),
    "paper.pdf": (b"%PDF-1.7 ...", ["paper.pdf", "pdftotext"]), "book.docx": (b"PK\x03\x04...", ["book.docx", "text"]),
}


@pytest.mark.parametrize("name", BAD)
def test_texts_that_are_refused(name, folder, capsys):
    content, parts = BAD[name]
    if content is not None:
        Path(name).write_bytes(content)
    assert main(["read", name, "--out", "o.json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in parts), line
    assert not Path("o.json").exists()


COMMANDS = {  # command line: parts of the answer
    "read": ["FILE"], "read t.txt --quest x": ["--quest"], "read t.txt --width 7 --checkpoint r/s": ["--width"],
    "read t.txt --checkpoint nowhere/memtrain": ["nowhere/memtrain", "RUN/STAGE"],
    "read t.txt --question " + "why" * 400: ["--question", "shorter"],
    "export --format hf --to x": ["--checkpoint"], "export --checkpoint r/s --format gguf --to x": ["gguf", "peft"],
    "export --checkpoint r/s --format hf --to full": ["--to full", "empty folder"],
    "export --checkpoint r/s --format hf --to " + str(ROOT / "data"): ["data"],
    "export --checkpoint nowhere/s --format hf --to x": ["nowhere/s"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_are_refused(command, folder, capsys, base_checkpoint):
    Path("t.txt").write_text("A text.")
    Path("full").mkdir()
    Path("full/x").write_text("there")
    Path("r/s").mkdir(parents=True)
    Path("r/config.json").write_text("{}")
    Path("r/s/checkpoint.safetensors").write_text("")
    assert main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(part in line for part in COMMANDS[command]), line
    assert not Path("x").exists() and Path("full/x").read_text() == "there"


def test_help_of_a_command_comes_before_torch():
    for name in ("read", "export"):
        done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "memtrain.py"), name, "--help"],
                              capture_output=True, text=True, check=True)
        assert "--checkpoint" in done.stdout and " torch" not in done.stderr


def test_a_run_of_our_own_is_read_and_not_exported(folder, capsys, monkeypatch, base_checkpoint):
    monkeypatch.setattr("eval.header.estimate", lambda *_: (0.0, 0))
    train = [*TINY, "--run", "t", "--init", base_checkpoint(), "--stages", "memtrain", "--memtrain-steps", "0"]
    assert main(train) == 0
    for form, said in (("hf", "a decoder of our own"), ("peft", "no adapters")):
        assert main(["export", "--checkpoint", "runs/t/memtrain", "--format", form, "--to", form]) == 2
        assert said in capsys.readouterr().err and not Path(form).exists()
    Path("t.txt").write_text(TEXT)
    assert "section 2" in read(capsys, "t.txt", "--checkpoint", "runs/t/memtrain", "--seed", "5")


# ---- conversations -----------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Let us meet in Tellinford.\nOr not?"}, {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "No, rather in Oskelmoor."}]


def test_a_chat_export_is_cut_at_its_turns(folder, capsys):
    Path("c.json").write_text(json.dumps(CHAT))
    assert lines_of("c.json")[0] == ["user: Let us meet in Tellinford. Or not?", "assistant: Noted.",
                                            "user: No, rather in Oskelmoor."]
    Path("d.json").write_text(json.dumps([{"speaker": m["role"], "text": m["content"]} for m in CHAT]))
    assert lines_of("d.json")[0] == lines_of("c.json")[0]
    Path("e.json").write_text(json.dumps([{"id": i, "role": m["role"], "content": [
        {"type": "text", "text": part} for part in m["content"].split("\n")]} for i, m in enumerate(CHAT)]))
    assert lines_of("e.json")[0] == lines_of("c.json")[0], "parts, behind another key"
    shown = read(capsys, "c.json", "--question", "Where do we meet?")
    assert "a conversation of assistant, user, cut at its turns" in shown and "section 1" in shown
    assert "answer:" in shown


def test_lines_of_a_conversation_belong_to_who_began(folder):
    talk = ("Nora: Let us meet.\nIn town, I mean.\n\nPiet: Yes.\nNora: At nine: sharp.\nPiet: Fine.\nNora: Bye.\n"
            "Piet: Bye.")
    assert lines(folder, talk.encode())[:3] == ["Nora: Let us meet. In town, I mean.", "Piet: Yes.",
                                                "Nora: At nine: sharp."]
    assert lines_of(str(folder / "t.txt"))[1] == {"Nora", "Piet"}
    pages = "\n".join(f"Page {i}: Of page {i}.\nMore of it." for i in range(9))
    assert lines(folder, pages.encode()) == pages.split("\n"), "headings that don't come back are no speakers"
    assert lines(folder, b"Note: one.\nTwo.\nThree.") == ["Note: one.", "Two.", "Three."], "a text like any other"


def test_a_name_may_stand_on_a_line_of_its_own(folder):
    talk = b"Nora: Let us meet.\nPiet:\nWhere?\nNora: In town.\nPiet: Fine."
    assert lines(folder, talk) == ["Nora: Let us meet.", "Piet: Where?", "Nora: In town.", "Piet: Fine."]


@pytest.mark.parametrize(("content", "said"), [
    (json.dumps(CHAT[:1]), "1 speaker; a conversation has two"),
    (json.dumps([*CHAT, {"role": "user", "content": " "}]), "turn 4: `content` is empty"),
    (json.dumps([*CHAT, {"role": "user"}]), "turn 4: a turn is {role, content}"),
    (json.dumps([*CHAT, {"role": "user", "content": 7}]), "turn 4: `content` must be a text"),
    (json.dumps(CHAT)[:-9], "JSON, and no chat that can be read"),
    (json.dumps({"messages": CHAT}), "no chat that can be read"),
    (json.dumps([{"role": "system", "content": "Be brief."}, CHAT[0]]), "1 speaker"),
    (json.dumps([{"role": "user", "content": [{"type": "image_url"}]}, *CHAT]), "turn 1: `content` must be a text"),
    ("Nora: Hi.\nPiet:\nNora: Bye.\nPiet: Bye.", "turn 2: Piet: and no text")])
def test_a_broken_chat_export_ends_in_one_line(folder, capsys, content, said):
    Path("c.json").write_text(content)
    assert main(["read", "c.json", "--threads", "1", "--out", "o.json"]) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert said in error and "c.json" in error and not Path("o.json").exists()


def test_each_question_has_a_reading_of_its_own(folder, capsys, monkeypatch):
    Path("t.txt").write_text(TEXT)
    one, two = "When was Mara Tellin born?", "When was Kigon Tellin born?"
    alone = [read(capsys, "t.txt", "--question", q).partition("section 1")[2].split("\n\n", 1) for q in (one, two)]
    shown = read(capsys, "t.txt", "--question", one, "--question", two, "--out", "o.json")
    assert "2 questions: one reading each" in shown
    for reading, answer in alone:
        assert reading in shown and answer.strip() in shown, "the same as if it were asked alone"
    told = json.loads(Path("o.json").read_text())
    assert [e["question"] for e in told if "question" in e] == [one, two]
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert read(capsys, "-", "--question", one, "--question", two) == shown


def test_one_reading_answers_all_where_no_turn_shows_the_problem(folder, capsys, monkeypatch):
    """A fork whose prompts leave it out."""
    Path("t.txt").write_text(TEXT)
    plain = (memtrain.SHORT[0].replace("Problem: {problem}\n", ""), *memtrain.SHORT[1:])
    monkeypatch.setattr(memtrain, "SHORT", plain)
    shown = read(capsys, "t.txt", "--question", "Who?", "--question", "When?")
    assert "2 questions: one reading for all" in shown
    assert shown.count("section 1 (") == 1 and shown.count("answer:") == 2
