"""What a run trains and is evaluated on: the problems that its configuration draws from a corpus.

Every problem is a function of (seed, index) alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from data import InputError
from data.config import Config, kind_of, lengths_of
from data.run.files import output
from data.run.terminal import printable
from data.search import SearchProblem, search_problem
from data.tasks import Problem, masked_document, qa_document
from data.text.benchmarks import load_benchmarks
from data.text.corpus import Corpus, Question, load_passages, load_questions
from data.text.entities import english, make_finder
from data.text.evidence import Evidence, plain, with_evidence
from data.text.retrieval import Retriever
from data.weights.tokenizer import Tokenizer
from data.world.miniwiki import FAMILIES, MiniWorld

PASSAGE = 240  # tokens: what long texts are split into; 150 of them are a document of the paper's 24,000 to 40,000


class Data:
    """Training and held-out passages, the entity finder, training and evaluation questions of one configuration."""

    def __init__(self, c: Config, tokenizer: Tokenizer):
        self.c, self.tokenizer, self.finder = c, tokenizer, make_finder(c.entities)
        self.world = self.held_out_world = None
        stages = c.stages.split(",")
        kinds = set(map(kind_of, stages))
        if c.corpus == "miniworld":
            self.world = MiniWorld(c.people, 0, "train")
            self.held_out_world = held_out = MiniWorld(c.people, 0, c.world)
            self.train, self.held_out = self.world.corpus(), held_out.corpus()
            self.questions = [held_out.question(i) for i in range(c.eval_questions)]
            self.train_questions: list[Question] = []
        else:
            self.whole = load_passages(c.corpus, max_words=min(PASSAGE, c.section), size=self._tokens)
            if self.finder.name == "rules" and not english(p.text for p in self.whole.passages[:1000]):
                note("the rules that find entities are made for English, and this corpus is not; give --entities "
                     "spacy:MODEL of its language")
            self.questions = load_questions(c.questions, c.eval_questions) if c.questions else []
            self.train_questions = load_questions(c.train_questions) if c.train_questions else []
            if "eval" in stages:
                self.questions = self._with_evidence(self.questions, "questions")
            if "memagent" in kinds:
                self.train_questions = self._with_evidence(self.train_questions, "train_questions")
            self.train, self.held_out = self.whole.split()
            self._refuse_leaks(self.questions)
            self._hold_out(self.questions, self.held_out)
        # a corpus that can't do what the stages need is refused before anything is trained or written
        if "memtrain" in stages:
            self.masked_problem(0)
        if "memagent" in kinds:
            self.training_question(0)
        if "mem1" in kinds:
            self.training_pair(0)
            if "eval" in stages:
                _ = self.benchmarks
        if "eval" in stages:
            self.evaluation_question(0, max(lengths_of(c)))
            if c.eval_masked:
                self.masked_problem(0, held_out=True)
        if c.index and Path(c.index).exists():
            self.retriever()

    @cached_property
    def benchmarks(self) -> dict[str, list[SearchProblem]]:
        """Pairs of questions for search QA by benchmark: the mini-world's families, --benchmarks, else --questions."""
        c = self.c
        if self.world:
            return {family: [world_pair(self.held_out_world, family, 2 * i) for i in range(c.eval_pairs)]
                    for family in FAMILIES}
        asked = {Path(c.questions).stem: self.questions[:2 * c.eval_pairs]}
        if c.benchmarks:
            asked = load_benchmarks(c.benchmarks, 2 * c.eval_pairs)
            questions = list(itertools.chain(*asked.values()))
            self._refuse_leaks(questions)
            self._hold_out(questions)
        return {name: [search_problem(pair, name) for pair in zip(q[::2], q[1::2], strict=False)]
                for name, q in asked.items()}

    def _refuse_leaks(self, questions: Iterable[Question]) -> None:
        """questions: of the evaluation. Case, punctuation and spaces make no other question of one."""
        asked = {plain(q.question): q.id for q in questions}
        for question in self.train_questions:
            if theirs := asked.get(plain(question.question)):
                raise InputError(f"--train-questions {self.c.train_questions}: question {question.id} is also question "
                                 f"{theirs} of the evaluation; give files without a question in common")

    def _with_evidence(self, questions: Sequence[Question], field: str) -> list[Question]:
        option = f"--{field.replace('_', '-')} {getattr(self.c, field)}"
        found, lacking = with_evidence(questions, self.whole, option)
        if lacking:
            note(f"{option}: {lacking} of {len(questions)} questions come without their evidence and are left out")
        return found

    def _hold_out(self, questions: Iterable[Question], also: Corpus | None = None) -> None:
        """Nothing that is trained on holds evidence of these questions of the evaluation: neither passages, which go
        to the corpus `also`, nor what comes with training questions. What that takes away is counted."""
        evidence = Evidence(questions)
        told = dict.fromkeys(p for p in self.train.passages if p in evidence)
        asked = [q for q in self.train_questions if not any(p in evidence for p in q.gold)]
        if not told and len(asked) == len(self.train_questions):
            return
        note(f"{len(told)} of {len(self.train)} training passages and {len(self.train_questions) - len(asked)} of "
             f"{len(self.train_questions)} training questions hold evidence of the evaluation's questions: held out")
        if len(told) == len(self.train) or (self.train_questions and not asked):
            raise InputError(f"--corpus {self.c.corpus}: nothing else is left to train on; give a larger corpus, and "
                             f"training questions about other pages")
        self.train = Corpus([p for p in self.train.passages if p not in told], self.train.name)
        if also:
            also.passages.extend(told)
        self.train_questions = [replace(q, distractors=tuple(p for p in q.distractors if p not in evidence))
                                for q in asked]

    def retriever(self, held_out: bool = True) -> Retriever:
        """The search tool over the passages that the evaluation's (or the training) questions are asked of. A
        mini-world's index is the one that finds related passages; that of files is of all of them, and kept."""
        if self.world:
            return (self.held_out if held_out else self.train).retriever
        return self._kept_retriever

    @cached_property
    def _kept_retriever(self) -> Retriever:
        folder = output(Path(self.c.index), "--index") if self.c.index else Path("runs", self.c.run, "index")
        return Retriever(self.whole, folder)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def masked_problem(self, index: int, held_out: bool = False) -> Problem:
        """Masked document `index` of the training (or held-out) passages; differs by --seed in training only."""
        corpus, seed = (self.held_out, -1) if held_out else (self.train, self.c.seed)
        return masked_document(corpus, self.finder, seed, index, self.c.passages, self.c.related,
                               self._tokens, self.c.masked_sections * self.c.section)

    def training_question(self, index: int) -> Problem:
        if self.world:
            question = self.world.question(index, self.c.seed)
        else:
            question = self.train_questions[random.Random(f"epoch:{self.c.seed}:{index}").randrange(
                len(self.train_questions))]
        tokens = self.c.train_sections * self.c.section
        return qa_document(question, self.train.passages, self.tokenizer, tokens, self.c.seed)

    def training_pair(self, index: int) -> SearchProblem:
        """Two training questions; in the mini-world of the families that stand for HotpotQA and NQ, which MEM1 was
        trained on."""
        rng = random.Random(f"pair:{self.c.seed}:{index}")
        if self.world:
            return world_pair(self.world, rng.choice(("hotpotqa", "nq")), 2 * index, self.c.seed)
        return search_problem(rng.sample(self.train_questions, 2), "train")

    def evaluation_question(self, index: int, length: int) -> Problem:
        return qa_document(self.questions[index], self.held_out.passages, self.tokenizer, length * self.c.section, 0)


def note(text: str) -> None:
    tqdm.write(printable(f"note: {text}"))


def world_pair(world: MiniWorld, family: str, index: int, seed: int = -1) -> SearchProblem:
    """Questions `index` and `index` + 1 of a family, with every passage that states their facts."""
    pair = [world.family_facts(family, index + i, seed) for i in range(2)]
    gold = tuple(tuple(tuple(world.passages[p].rendered for p in world.where[fact]) for fact in facts)
                 for _, facts in pair)
    return search_problem([question for question, _ in pair], family, gold)
