"""What a run trains and is evaluated on: the problems that its configuration draws from a corpus.

Every problem is a function of (seed, index) alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from data import InputError
from data.config import Config, kind_of, lengths_of
from data.run.files import output
from data.search import SearchProblem, search_problem
from data.tasks import Problem, masked_document, qa_document
from data.text.benchmarks import load_benchmarks
from data.text.corpus import Corpus, Question, load_passages, load_questions
from data.text.entities import make_finder
from data.text.retrieval import Retriever
from data.weights.tokenizer import Tokenizer
from data.world.miniwiki import FAMILIES, MiniWorld


class Data:
    """Training and held-out passages, the entity finder, training and evaluation questions of one configuration."""

    def __init__(self, c: Config, tokenizer: Tokenizer):
        self.c, self.tokenizer, self.finder = c, tokenizer, make_finder(c.entities)
        self.world = self.held_out_world = None
        self.kept_out = 0  # passages that hold evidence of evaluation questions: nothing is trained on them
        stages = c.stages.split(",")
        kinds = set(map(kind_of, stages))
        if c.corpus == "miniworld":
            self.world = MiniWorld(c.people, 0, "train")
            self.held_out_world = held_out = MiniWorld(c.people, 0, c.world)
            self.train, self.held_out = self.world.corpus(), held_out.corpus()
            self.questions = [held_out.question(i) for i in range(c.eval_questions)]
            self.train_questions: list[Question] = []
        else:
            self.whole = load_passages(c.corpus)
            self.train, self.held_out = self.whole.split()
            self.questions = list(_of_files(c.questions, c.eval_questions))
            self.train_questions = list(_of_files(c.train_questions))
            self.train, self.kept_out = without_evidence(self.train, self.questions)
            self._refuse_leaks(self.questions)
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
            self._refuse_leaks(itertools.chain(*asked.values()))
        return {name: [search_problem(pair, name) for pair in zip(q[::2], q[1::2], strict=False)]
                for name, q in asked.items()}

    def _refuse_leaks(self, questions: Iterable[Question]) -> None:
        """questions: of the evaluation."""
        asked = {q.question: q.id for q in questions}
        if leak := next((q for q in self.train_questions if q.question in asked), None):
            raise InputError(f"--train-questions {self.c.train_questions}: question {leak.id} is also question "
                             f"{asked[leak.question]} of the evaluation; give files without a question in common")

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

    def masked_problem(self, index: int, held_out: bool = False) -> Problem:
        """Masked document `index` of the training (or held-out) passages; differs by --seed in training only."""
        corpus, seed = (self.held_out, -1) if held_out else (self.train, self.c.seed)
        return masked_document(corpus, self.finder, seed, index, self.c.passages, self.c.related,
                               lambda text: len(self.tokenizer.encode(text)), self.c.masked_sections * self.c.section)

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


def _of_files(spec: str, limit: int | None = None) -> Iterator[Question]:
    """The questions of comma-separated files, as many of each; `limit` of them in all."""
    names = [n for n in spec.split(",") if n]
    for name in names:
        yield from load_questions(name, limit and max(1, limit // len(names)))


def without_evidence(corpus: Corpus, questions: Iterable[Question]) -> tuple[Corpus, int]:
    """(the corpus without passages that share a title with the evidence of `questions`, how many those are)."""
    titles = {p.title for q in questions for p in q.gold}
    kept = [p for p in corpus.passages if p.title not in titles]
    out = len(corpus) - len(kept)
    return (Corpus(kept, corpus.name, corpus.clues) if out else corpus), out


def world_pair(world: MiniWorld, family: str, index: int, seed: int = -1) -> SearchProblem:
    """Questions `index` and `index` + 1 of a family, with every passage that states their facts."""
    pair = [world.family_facts(family, index + i, seed) for i in range(2)]
    gold = tuple(tuple(tuple(world.passages[p].rendered for p in world.where[fact]) for fact in facts)
                 for _, facts in pair)
    return search_problem([question for question, _ in pair], family, gold)
