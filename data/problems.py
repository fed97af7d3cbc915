"""What a run trains and is evaluated on: the problems that its configuration draws from a corpus.

Every problem is a function of (seed, index) alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from data import InputError
from data.config import Config, flag, kind_of, lengths_of
from data.run.terminal import note
from data.search import SearchProblem, search_problem, with_contexts
from data.tasks import Problem, in_epochs, last_masked, masked_document, masked_in_order, permutation, qa_document
from data.text.benchmarks import load_benchmarks, load_local
from data.text.corpus import Corpus, Question, load_passages, load_questions
from data.text.dense import Dense, retriever_of
from data.text.entities import english, make_finder
from data.text.evidence import Evidence, evidence_held, with_evidence, without_evidence
from data.text.retrieval import Retriever
from data.text.words import compared
from data.weights.tokenizer import Tokenizer
from data.world.miniwiki import FAMILIES, MiniWorld
from data.world.timeline import ROOM, Changing, Timeline

PASSAGE = 240  # tokens: what long texts are split into; 150 of them are a document of the paper's 24,000 to 40,000


class Data:
    """Training and held-out passages, the entity finder, training and evaluation questions of one configuration."""

    def __init__(self, c: Config, tokenizer: Tokenizer):
        self.c, self.tokenizer = c, tokenizer
        # the rules know the mini-world's names; its figures must not hang on what else is installed
        self.finder = make_finder("rules" if (c.corpus, c.entities) == ("miniworld", "auto") else c.entities)
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
            self.whole = self._passages(c.corpus)
            if self.finder.name == "rules" and not english(p.text for p in self.whole.passages[:1000]):
                note("the rules that find entities are made for English, and this corpus is not; give --entities "
                     "spacy:MODEL of its language")
            self.train, self.held_out = self.whole.split()
            self.questions = list(_of_files(c.questions, c.eval_questions))
            self.train_questions = list(_of_files(c.train_questions))
            self._refuse_leaks(self.questions)
            if "eval" in stages:
                self.questions = self._with_evidence(self.questions, "questions")
            if "memagent" in kinds:
                self.train_questions = self._with_evidence(self.train_questions, "train_questions")
            self._hold_out(self.questions)
            if "mem1" in kinds and "eval" in stages:
                self._hold_out(itertools.chain(*self._asked.values()))
        if c.retriever != "bm25":
            self.train.searched_by = self.held_out.searched_by = c.retriever
        # a corpus that can't do what the stages need is refused before anything is trained or written
        if "memtrain" in stages:
            self.masked_problem(0)
        if "memagent" in kinds:
            self.training_question(0)
        if "mem1" in kinds:
            self.training_pair(0)
            if not self.world:
                _ = self.searched
            if "eval" in stages:
                _ = self.benchmarks
        if "eval" in stages:
            self.evaluation_question(0, max(lengths_of(c)))
            if c.eval_masked:
                self.masked_problem(0, held_out=True)

    @cached_property
    def benchmarks(self) -> dict[str, list[SearchProblem]]:
        """Pairs of questions for search QA by benchmark: the mini-world's families, --benchmarks, else --questions."""
        if self.world:
            c = self.c
            return {family: [world_pair(self.held_out_world, family, 2 * i) for i in range(c.eval_pairs)]
                    for family in FAMILIES}
        return {name: [search_problem(pair, name) for pair in zip(q[::2], q[1::2], strict=False)]
                for name, q in self._asked.items()}

    @cached_property
    def _asked(self) -> dict[str, list[Question]]:
        """Questions for search QA by benchmark, where they are read from files."""
        c = self.c
        if not c.benchmarks:
            if len(self.questions) < 2:
                raise InputError(f"--questions {c.questions}: one question, and search asks two at once; give more, or "
                                 f"--benchmarks")
            return {Path(c.questions).stem: self.questions[:2 * c.eval_pairs]}
        asked = load_benchmarks(c.benchmarks, 2 * c.eval_pairs)
        self._refuse_leaks(itertools.chain(*asked.values()))
        return asked

    def _refuse_leaks(self, questions: Iterable[Question]) -> None:
        """questions: of the evaluation. Case, punctuation and spaces make no other question of one."""
        def key(q: Question) -> tuple:  # stories ask the same of other things that happened
            return compared(q.question) or q.question, q.gold if q.ordered else ()

        asked = {key(q): q.id for q in questions}
        if leak := next((q for q in self.train_questions if key(q) in asked), None):
            raise InputError(f"--train-questions {self.c.train_questions}: question {leak.id} is also question "
                             f"{asked[key(leak)]} of the evaluation; give files without a question in common")

    def _with_evidence(self, questions: Sequence[Question], field: str) -> list[Question]:
        option = f"{flag(field)} {getattr(self.c, field)}"
        found, lacking = with_evidence(questions, self.whole, option)
        if lacking:
            note(f"{option}: {lacking} of {len(questions)} questions come without their evidence and are left out")
        return found

    def _hold_out(self, questions: Iterable[Question]) -> None:
        """Nothing that is trained on holds evidence of these questions of the evaluation: neither passages nor what
        comes with training questions. What that takes away is counted, passages in the run's header."""
        evidence, asked = Evidence(questions), self.train_questions
        self.train, out = without_evidence(self.train, evidence)
        self.kept_out += out
        self.train_questions = [replace(q, distractors=tuple(p for p in q.distractors if p not in evidence))
                                for q in asked if not evidence.of(q)]
        if lost := len(asked) - len(self.train_questions):
            note(f"--train-questions {self.c.train_questions}: {lost} of {len(asked)} hold evidence of evaluation "
                 f"questions and are left out")
        if asked and not self.train_questions:
            raise InputError(f"--train-questions {self.c.train_questions}: all of them hold evidence of evaluation "
                             f"questions; give questions about other pages")

    def _passages(self, spec: str) -> Corpus:
        return load_passages(spec, max_words=min(PASSAGE, self.c.section), size=self._tokens)

    def _tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    @cached_property
    def searched(self) -> Corpus:
        """What a search looks through, where it is read from files: the same in training and in evaluation."""
        c = self.c
        if c.search_corpus:
            return self._passages(c.search_corpus)
        own = load_local(c.benchmarks, 2 * c.eval_pairs) if c.benchmarks else []
        return with_contexts(self.whole, [*self.train_questions, *self.questions, *own])

    def evidence(self) -> dict[str, tuple]:
        """What the index holds of the evidence for the questions that search is trained on and, where it is to be
        evaluated, asked: {set: (found, of, what)}."""
        asked = self._asked if "eval" in self.c.stages.split(",") else {}
        return evidence_held({"training": self.train_questions} | asked, self.searched.passages)

    def retriever(self, held_out: bool = True) -> Retriever | Dense:
        """The search tool over the passages that the evaluation's (or the training) questions are asked of. A
        mini-world's index is the one that finds related passages; that of files is of all of them."""
        if self.world:
            return (self.held_out if held_out else self.train).retriever
        return self._retriever

    @cached_property
    def _retriever(self) -> Retriever | Dense:
        return retriever_of(self.c.retriever, self.searched)

    @property
    def papers_mask(self) -> bool:
        """Whether training hides what the paper hides: any entity, in an encyclopaedia."""
        return self.c.mask == "any" and self.c.masked_text == "encyclopaedia"

    def masked_problem(self, index: int, held_out: bool = False) -> Problem:
        """Masked document `index` of the training (or held-out) passages; differs by --seed in training only. Held-out
        ones are the paper's, whatever is trained on."""
        if not held_out and not self.papers_mask and not (self.c.masked_text == "both" and index % 2):
            return self._masked_in_order(index)
        corpus, seed = (self.held_out, -1) if held_out else (self.train, self.c.seed)
        return masked_document(corpus, self.finder, seed, index, self.c.passages, self.c.related,
                               self._tokens, self.c.masked_sections * self.c.section)

    def _masked_in_order(self, index: int) -> Problem:
        """A document of the timeline, or passages of the corpus as they come. InputError if nothing can be masked."""
        c, passages = self.c, self.train.passages
        room = ROOM if self.world else c.window - c.section - c.memory - c.response - 24
        for attempt in range(200):
            id = f"mask-{c.seed}-{index}-{attempt}"
            rng = random.Random(f"{c.mask}:{id}")
            if self.world:
                text = self.timeline.document(index * 200 + attempt, c.train_sections * c.section, c.seed)
            else:
                first = rng.randrange(max(1, len(passages) - c.passages + 1))
                text = [p.rendered for p in passages[first:first + c.passages]]
            if c.mask == "last":
                made = last_masked(id, text, self.finder, self.tokenizer, c.section, room, rng)
            else:
                known = partial(self.timeline.determined, passages=text)
                made = masked_in_order(id, text, self.finder, rng, known)
            if made:
                return made
        raise InputError(f"--mask {c.mask}: nothing to hide in 200 documents of {self.train.name}; give a text whose "
                         f"names come back with others in their place, or --mask any")

    @cached_property
    def timeline(self) -> Timeline:
        return Timeline(self.world, self.tokenizer)

    @cached_property
    def held_out_timeline(self) -> Timeline:
        return Timeline(self.held_out_world, self.tokenizer)

    def changing_question(self, index: int, length: int) -> Changing:
        """Evaluation question `index` about facts that change, in a document of `length` sections."""
        return self.held_out_timeline.question(index, length * self.c.section)

    def training_question(self, index: int) -> Problem:
        if self.world:
            question = self.world.question(index, self.c.seed)
        else:
            question = self.train_questions[in_epochs(f"epoch:{self.c.seed}", index, len(self.train_questions))]
        tokens = self.c.train_sections * self.c.section
        return qa_document(question, self.train.passages, self.tokenizer, tokens, self.c.seed)

    def training_pair(self, index: int) -> SearchProblem:
        """Two training questions; in the mini-world of the families that stand for HotpotQA and NQ, which MEM1 was
        trained on."""
        c = self.c
        if self.world:
            family = random.Random(f"pair:{c.seed}:{index}").choice(("hotpotqa", "nq"))
            return world_pair(self.world, family, 2 * index, c.seed)
        pairs = len(self.train_questions) // 2
        if not pairs:
            raise InputError(f"--train-questions {c.train_questions}: one question, and search asks two at once; give "
                             f"more")
        epoch, place = divmod(index, pairs)  # every question once an epoch; of an odd number one is left out
        order = permutation(f"pairs:{c.seed}:{epoch}", len(self.train_questions))
        return search_problem([self.train_questions[order[2 * place + k]] for k in (0, 1)], "train")

    def evaluation_question(self, index: int, length: int) -> Problem:
        return qa_document(self.questions[index], self.held_out.passages, self.tokenizer, length * self.c.section, 0)


def _of_files(spec: str, limit: int | None = None) -> Iterator[Question]:
    """The questions of comma-separated files, as many of each; `limit` of them in all."""
    names = [n for n in spec.split(",") if n]
    for name in names:
        yield from load_questions(name, limit and max(1, limit // len(names)))


def world_pair(world: MiniWorld, family: str, index: int, seed: int = -1) -> SearchProblem:
    """Questions `index` and `index` + 1 of a family, with every passage that states their facts."""
    pair = [world.family_facts(family, index + i, seed) for i in range(2)]
    gold = tuple(tuple(tuple(world.passages[p].rendered for p in world.where[fact]) for fact in facts)
                 for _, facts in pair)
    return search_problem([question for question, _ in pair], family, gold)
