"""Text that is not English: what is searched, masked, cut and asked, in any script; and question files of any form."""

import dataclasses
import gzip
import json
import random

import pytest
from test_text_corpus import HOTPOT, refuses, write

from data.problems import Data
from data.tasks import around, masked_document, recall_target
from data.text.conversations import speaking
from data.text.corpus import Corpus, Passage, Question, load_passages, load_questions, split_text
from data.text.entities import Entity, RuleFinder, english, mask_entity, occurs, shows
from data.text.evidence import Evidence, evidence_held, with_evidence
from data.text.words import SENTENCE_END, compared, count, searched

WORLD = [
    ("猫", "家里养着的，寿命很长。"),
    ("杭州", "杭州以西湖闻名，位于浙江省北部。"), ("成都", "成都是四川省的省会，以大熊猫闻名。"),
    ("大阪", "大阪は日本の西にある商業の都市である。"), ("札幌", "札幌は北海道の道庁がある都市である。"),
    ("เชียงใหม่", "เชียงใหม่เป็นเมืองใหญ่ทางภาคเหนือ"), ("ภูเก็ต", "ภูเก็ตเป็นเกาะในทะเลอันดามัน"),
    ("जयपुर", "जयपुर राजस्थान की राजधानी है।"), ("부산", "부산은 한국의 남동쪽에 있는 항구이다."),
]


@pytest.mark.parametrize(("query", "title"), [
    ("西湖在哪个城市？", "杭州"), ("大熊猫的省会", "成都"), ("猫活多少年？", "猫"),
    ("北海道の道庁はどこ", "札幌"), ("商業の都市", "大阪"),
    ("เกาะในทะเลคืออะไร", "ภูเก็ต"), ("เมืองใหญ่ทางภาคเหนือ", "เชียงใหม่"), ("राजस्थान", "जयपुर"), ("한국에서 항구", "부산")])
def test_search_finds_words_of_every_script(query, title):
    corpus = Corpus([Passage(*p) for p in WORLD], "world")
    assert corpus.passages[corpus.search(query, 1)[0]].title == title
    copies = Corpus([*corpus.passages, *(Passage(f"{t} 2", f"{text} {t}") for t, text in WORLD)], "twice")
    for i in range(len(WORLD)):
        assert copies.related(i, 1) == [i + len(WORLD)], "not passages 0, 1 and 2"


def test_words_and_lengths():
    assert compared("Salt &amp; Sea_Wall") == compared("salt: SEA wall") == ("salt", "sea", "wall")
    assert compared("कोच्चि में。Ｏｓ\u00adｔｒｅｌ") == ("कोच्चि", "में", "ostrel")
    assert compared("金山、Ostrel") == ("金", "山", "ostrel")
    assert list(searched("दिल्ली में")) == ["दिल्ली", "में"], "vowel signs belong to their word"
    assert list(searched("Ｂｅｒｌｉｎ的大学x")) == ["berlin", "的大", "大学", "的", "大", "学"]
    assert list(searched("金")) == ["金"] and list(searched("カナ")) == ["カナ"]
    assert list(searched("A b, the U.S. x_1 don't")) == ["the", "x_1", "don"], "ASCII as ever"
    assert [count(t) for t in ("one  two three", "一二三", "กา ก่า", "", "x" * 100)] == [3, 3, 4, 0, 3]


@pytest.mark.parametrize(("text", "entity", "expected"), [
    ("他读过石头记，石头记很长。", "石头记", "他读过#，#很长。"), ("由Ann Lee执导", "Ann Lee", "由#执导"),
    ("กรุงเทพอยู่ไทย", "กรุงเทพ", "#อยู่ไทย"), ("กำกา", "กา", "กำ#"), ("นี้ นี", "นี", "นี้ #"),
    ("राम रामायण राम।", "राम", "# रामायण #।"), ("दिल्लीवासी दिल्ली से", "दिल्ली", "दिल्लीवासी # से"),
    ("マリアとマリ", "マリ", "マリアと#"), ("부산은 부산역, 대부산", "부산", "#은 #역, 대부산"),
    ("Ереван, Еревана", "Ереван", "#, Еревана"), ("2024年和12024年", "2024年", "#和12024年")])
def test_masks(text, entity, expected):
    assert mask_entity(text, entity, "#") == (expected, expected.count("#"))
    assert not occurs(expected, entity)


@pytest.mark.parametrize(("text", "entity", "shown"), [
    ("Romeo", "Rome", False), ("1843", "18", False), ("[MASK] é", "mask", False),
    ("Карелия", "рел", False), ("Orléansville", "Orléans", False),
    ("в Ереване", "Ереван", True), ("Σπάρτης", "Σπάρτη", True), ("примерно", "Рим", False),
    ("Ｒｏｍｅ", "Rome", True), ("Ro\u00adme", "Rome", True), ("STRASSE é", "Straße", True), ("石 头·记", "石头", True),
    ("والأردن", "الأردن", True), ("وتونس", "تونس", True), ("רמאללה", "מאללה", True),
    ("रामायण", "राम", True), ("대부산", "부산", True), ("アンナ", "アン", True)])
def test_shows(text, entity, shown):
    assert shows(text, entity) == shown


class Named:
    """Finds what it is told, wherever it stands."""

    name = "named"

    def __init__(self, *names: str):
        self.names = names

    def find(self, text: str) -> list[Entity]:
        return [Entity(n, "NAME", text.find(n), text.find(n) + len(n)) for n in self.names if n in text]


def test_no_document_shows_its_answer():
    names = ["石头记", "تونس", "부산", "Minsk"]
    texts = ["石头记很长。很多人读石头记。", "تونس مدينة وتونس بلد.", "부산은 크다. 대부산.", "Minsk is old, Мinsk."]
    corpus = Corpus([Passage(f"p{i}", text) for i, text in enumerate(texts)], "four")
    documents = [masked_document(corpus, Named(*names), 0, i, 4, 2) for i in range(30)]
    assert {d.answers[0] for d in documents} == {"石头记", "Minsk"}, "where others are masked they still show"
    assert not any(d.answers[0] in "\n".join(d.passages) for d in documents)
    assert all("[MASK]" in "\n".join(d.passages) for d in documents)
    drawn = {recall_target("\n".join(texts), Named(*names), random.Random(i))[1] for i in range(30)}
    assert drawn == {"石头记", "Minsk"}
    assert recall_target(texts[1], Named(*names), random.Random(0)) is None
    only = Corpus(corpus.passages[1:3], "two")
    refuses(lambda: masked_document(only, Named(*names), 0, 0, 2, 1), "none that masks hide")


def test_the_words_around_a_mask():
    assert around("she went  to [MASK], by the sea", "[MASK]", 3) == "to [MASK], by"
    assert around("很久以前他住在[MASK]的西边", "[MASK]", 4) == "住在[MASK]的"


def test_turns_of_every_script():
    assert speaking(["राम: नमस्ते", "सीता: हाँ", "राम: अच्छा"]) == {"राम", "सीता"}
    assert speaking(["李明：你好", "小红：你好", "李明：再见"]) == {"李明", "小红"}


def test_rules_in_other_text():
    found = lambda text: [e.text for e in RuleFinder().find(text)]  # noqa: E731
    assert found("Он жил в Минске.") == ["Минске"] and found("Elle vit à Lyon.") == ["Lyon"]
    assert found("Sie wohnt in Bonn.") == ["Bonn"] and found("Nous rions. Elles aussi. Wir auch.") == []
    assert found("Hij woont in Delft.") == ["Delft"] and found("Lei canta. Мы живём. Ben sang.") == ["Ben"]
    assert found("他在1843年写了《石头记》，由Ann Lee翻译。") == ["1843", "石头记", "Ann Lee"]
    assert english(["The king of the town went to sea with his men."])
    assert not english(["Der König der Stadt fuhr zur See."])
    assert not english(["他来了。"])


def test_sentences_end_in_every_script():
    for text, parts in (("他来了。她走了！「好。」他说。", ["他来了。", "她走了！", "「好。」", "他说。"]),
                        ("何！？嘘！！「え！？」と", ["何！？", "嘘！！", "「え！？」", "と"]),
                        ("वह था। वह है।", ["वह था। ", "वह है।"]), ("وہ تھا۔ وہ ہے۔", ["وہ تھا۔ ", "وہ ہے۔"]),
                        ("One. Two (three.) 4", ["One. ", "Two (three.) ", "4"])):
        assert SENTENCE_END.split(text) == parts and "".join(parts) == text


def test_long_text_is_cut_in_every_script(tmp_path, tokenizer):
    rng = random.Random(0)
    chinese = "".join(rng.choice("天地玄黄宇宙洪荒日月盈") for _ in range(20_000))
    for text in (chinese, "กขคงจ" * 4000, "x" * 20_000, ("वह शहर में था। " * 900)):
        parts = split_text(text, 50)
        assert len(parts) > 5 and all(0 < count(p) <= 50 for p in parts)
        assert "".join("".join(parts).split()) == "".join(text.split()), "nothing is lost"
        size = lambda t: len(tokenizer.encode(t))  # noqa: E731
        assert max(map(size, split_text(text, 120, size))) <= 120
    lines = "श्री राम का शहर।\n" * 30 + "他来了。\n" * 30 + "وہ تھا۔\n" * 30
    kept = " ".join(split_text(lines, 20))
    assert [kept.count(s) for s in ("श्री राम का शहर।", "他来了。", "وہ تھا۔")] == [30] * 3, "none is a heading"
    path = write(tmp_path / "b.txt", chinese)
    assert len(load_passages(path)) > 10


# ---- question files of any form


def test_question_files(tmp_path):
    records = [{**HOTPOT, "_id": f"q{i}", "answer": answer} for i, answer in enumerate(["Zoë", 1843, 12.0, 3.5])]
    expected = [("Zoë",), ("1843",), ("12",), ("3.5",)]
    lines, whole = "\n".join(map(json.dumps, records)), json.dumps(records, indent=1)
    pretty = "\n".join(json.dumps(r, indent=2) for r in records)
    forms = {"a.jsonl.gz": gzip.compress(lines.encode()), "a.json.gz": gzip.compress(whole.encode()),
             "b.jsonl": lines.encode("utf-16"), "b.json": whole.encode("utf-16"), "c.json": lines.encode("utf-32"),
             "d.json": pretty, "e.json": json.dumps({"version": 1, "data": records}, indent=1), "f.JSON": "\n" + whole,
             "g.json": json.dumps({"data": records})}
    for name, content in forms.items():
        assert [q.answers for q in load_questions(write(tmp_path / name, content))] == expected, name
    assert load_questions(write(tmp_path / "one.json", json.dumps(records[1], indent=4)))[0].answers == ("1843",)
    refuses(lambda: load_questions(write(tmp_path / "x.json", pretty[:-9])), "x.json, line", "not JSON")
    for answer in (True, float("nan"), float("-inf"), None, {}):
        bad = write(tmp_path / "n.json", json.dumps([{**HOTPOT, "answer": answer}]))
        refuses(lambda bad=bad: load_questions(bad), "n.json, record 1", "instead of a string")


def test_parquet_as_the_hub_ships_it(tmp_path):
    import pyarrow
    from pyarrow import parquet

    columns = {"id": ["a", "b"], "question": ["Who?", "When?"], "answer": ["Ann", "1843"], "type": ["bridge"] * 2,
               "supporting_facts": [{"title": ["Ann"], "sent_id": [0]}] * 2,
               "context": [{"title": ["Ann", "Bob"], "sentences": [["Ann was.", " Old."], ["Bob."]]}] * 2}
    parquet.write_table(pyarrow.table(columns), tmp_path / "h.parquet")
    write(tmp_path / "h.parquet.gz", gzip.compress((tmp_path / "h.parquet").read_bytes()))
    for name in ("h.parquet", "h.parquet.gz"):
        first, second = load_questions(str(tmp_path / name))
        assert first.gold == (Passage("Ann", "Ann was. Old."),) and second.answers == ("1843",)
    refuses(lambda: load_questions(write(tmp_path / "x.parquet", "text")), "x.parquet", "not a parquet file")


# ---- evidence


PAGE = "The old mill of Ostrel was built by Juman Demorn in the spring of 1741."


def asked(id: str, title: str, text: str = PAGE, **more) -> Question:
    return Question(id, f"Who built {id}?", ("Juman Demorn",), (Passage(title, text),), (), **more)


def test_evidence_is_a_page_or_a_sentence():
    evidence = Evidence([asked("q", "Ostrel Mill"), asked("s", "", "A story of its own, told in more than eight words.",
                                                          ordered=True)])
    told = [Passage("ostrel  mill!", "Another dump."), Passage("file 7", f"First. {PAGE.upper()} Then."),
            Passage("x", PAGE.replace(" ", "\xa0"))]
    assert all(p in evidence for p in told)
    assert not any(p in evidence for p in (Passage("Ostrel", "A town."), Passage("", "It was built by Juman Demorn."),
                                           Passage("", "A story of its own, told in more than eight words.")))


def test_evidence_that_did_not_come_along_counts_by_its_title():
    bare = Question("q", "Who?", ("x",), (), (), missing=("Salt &amp; Sea",))
    evidence = Evidence([bare])
    assert Passage("salt & sea", "A play.") in evidence and Passage("Sea", "A play.") not in evidence
    assert evidence.of(dataclasses.replace(bare, id="r", missing=("SALT & SEA",)))
    assert evidence.of(asked("s", "Salt & Sea")) and not evidence.of(asked("t", "Ostrel Mill"))
    assert not evidence.of(asked("u", "Salt & Sea", ordered=True)), "a story's lines have speakers, not titles"


def test_evidence_that_came_along_is_known_by_the_words_of_its_title(tmp_path):
    pages = [["Salt & Sea", ["It is a play."]], ["Ostrel mill", ["A mill."]], ["Void", ["", " "]], ["Ann", ["A."]],
             ["ostrel Mill", ["A song."]], ["Port", ["A town."]], ["port", ["A wine."]]]
    record = {**HOTPOT, "context": pages, "supporting_facts": [["Salt &amp; Sea", 0], ["Ostrel  mill", 1], ["Void", 0],
                                                                    ["Port", 0]]}
    (found,) = load_questions(write(tmp_path / "q.json", json.dumps([record])))
    assert [p.title for p in found.gold] == ["Salt & Sea", "Ostrel mill", "Port"] and found.missing == ("Void",)
    assert [p.title for p in found.distractors] == ["Ann", "ostrel Mill", "port"], "a page without text is none"


def test_flashrag_says_where_its_evidence_is(tmp_path):
    row = {"id": "a", "question": "Who?", "golden_answers": ["Ann"]}
    facts = {"supporting_facts": {"title": ["B", "Ostrel  Mill", "B"], "sent_id": [0, 1, 2]}}
    rows = [row, row | {"id": "b", "metadata": facts}, row | {"id": "c", "metadata": {"level": 1}},
            row | {"id": "d", "metadata": None}]
    found = load_questions(write(tmp_path / "f.jsonl", "\n".join(map(json.dumps, rows))))
    assert [q.missing for q in found] == [(), ("B", "Ostrel Mill"), (), ()]
    corpus = Corpus([Passage("B", "one"), Passage("ostrel mill", "two")], "c")
    assert [p.text for p in with_evidence(found[1:2], corpus, "--questions f")[0][0].gold] == ["one", "two"]


@pytest.mark.parametrize(("answer", "text", "held"), [
    ("杭州", "他住在杭州。", 1), ("กรุงเทพ", "อยู่ในกรุงเทพ", 1), ("कोच्चि", "वह कोच्चि में है।", 1),
    ("कोच", "वह कोच्चि में है।", 0),
    ("Rome", "Romeo sang.", 0), ("rome", "In ROME.", 1)])
def test_answers_that_an_index_states(answer, text, held):
    question = Question("q", "?", (answer,), (), ())
    assert evidence_held({"q": [question]}, [Passage("t", text)]) == {"q": (held, 1, "answers stated")}


def test_evidence_is_looked_up_by_title():
    corpus = Corpus([Passage("Ostrel Mill", "one"), Passage("Ostrel mill", "two"), Passage("B", "three")], "c")
    bare = Question("q", "Who?", ("x",), (), (Passage("B", "three"),), missing=("OSTREL MILL",))
    found, lacking = with_evidence([bare, asked("r", "B")], corpus, "--questions q.json")
    assert [p.text for p in found[0].gold] == ["one", "two"] and found[0].missing == () and lacking == 0
    (very,), _ = with_evidence([dataclasses.replace(bare, missing=("Ostrel mill",))], corpus, "")
    assert [p.text for p in very.gold] == ["two"], "the very title goes before its like"
    half = dataclasses.replace(bare, missing=("Ostrel Mill", "Gone"))
    few = [asked(str(i), "B") for i in range(40)]
    assert with_evidence([*few, half], corpus, "--questions q.json") == (few, 1), "one of 41 is left out"
    for lost, why in ((half, "'Gone'"), (dataclasses.replace(bare, missing=()), "no passages")):
        refuses(lambda lost=lost: with_evidence([few[0], lost], corpus, "--questions q.json"),
                "--questions q.json: 1 of 2", "evidence", why, "contexts", "--corpus", "--benchmarks")


def test_nothing_trained_on_holds_evidence(folder, tiny, tokenizer, capsys):
    rows = [{"title": f"Town {i}", "text": f"Town {i} was ruled by Ann Lee{i} of Bonn."} for i in range(200)]
    record = lambda id, title, *others: {  # noqa: E731
        "_id": id, "question": f"Who ruled {id}?", "answer": "Ann", "supporting_facts": [[title, 0]],
        "context": [[t, [f"{t} was ruled by Ann."]] for t in (title, *others)]}
    write(folder / "c.jsonl", "\n".join(map(json.dumps, rows)))
    trained = Corpus([Passage(r["title"], r["text"]) for r in rows], "c").split()[0].passages
    one, two, three, four = (p.title for p in trained[:4])
    write(folder / "q.json", json.dumps([record("a", one), record("b", two)]))
    write(folder / "t.json", json.dumps([record("c", two), record("d", three, one, four)]))
    options = ["--corpus", "c.jsonl", "--questions", "q.json", "--train-questions", "t.json", "--entities", "rules"]
    data = Data(tiny(*options), tokenizer)
    assert data.train.passages == [p for p in trained if p.title not in (one, two)] and data.kept_out == 2
    assert [(q.id, [p.title for p in q.distractors]) for q in data.train_questions] == [("d", [four])]
    assert "1 of 2 hold evidence of evaluation questions" in capsys.readouterr().out
    for text in ("who ruled  A", "WHO RULED: a?!"):
        write(folder / "t.json", json.dumps([{**record("e", three), "question": text}]))
        refuses(lambda: Data(tiny(*options), tokenizer), "question e is also question a")
    write(folder / "t.json", json.dumps([record("c", two)]))
    refuses(lambda: Data(tiny(*options), tokenizer), "t.json", "all of them hold evidence")


def test_a_corpus_that_the_rules_are_not_made_for_is_noted(folder, tiny, tokenizer, capsys):
    rows = [{"title": f"第{i}", "text": f"作者{i}写了《石头记{i}》。"} for i in range(90)]
    write(folder / "c.jsonl", "\n".join(map(json.dumps, rows)))
    Data(tiny("--corpus", "c.jsonl", "--entities", "rules", "--stages", "memtrain"), tokenizer)
    assert "made for English" in capsys.readouterr().out
