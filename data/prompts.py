"""The prompts, in one place: for training, demonstrations and evaluation alike.

Every prompt is a pair of token lists (prefix, given). The prefix is shared by a group of rollouts, the given
tokens belong to one rollout and are never trained; what the model samples comes after them. Prompts are joined
from ids, so a memory that the model wrote goes back in as the very tokens it sampled, but for control tokens: one that
is sampled in a memory opens no turn in the next prompt.

    order "section-first":  [user, instruction, problem, section | memory, assistant]   prefix shared by all rollouts
    order "paper":          [user, instruction, problem | memory, section, assistant]   little left to share

`user` and `assistant` are what the tokenizer's chat template puts around a user's text: one id each for the nano
model, "<|im_start|>assistant\n" and the like for a published one.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.weights.tokenizer import Tokenizer

UPDATE = "Update the memory.\nProblem: {problem}\n"
ANSWER = "Answer from the memory in \\boxed{{}}.\nProblem: {problem}\n"
DIRECT = "Answer from the text in \\boxed{{}}.\nProblem: {problem}\n"
RECALL = "Name [TARGET] from the memory in \\boxed{{}}.\n"
SEARCH = "Update the memory, then search or answer.\nProblem: {problem}\n"
MASK_PROBLEM = "Which entity is [MASK] in the whole article?"
LAST_PROBLEM = "Name [MASK]. {sentence}"  # it stands at the end of the text
NO_MEMORY = " No memory yet."
NO_RESULT = " No search yet.\n"
LAST_TURN = "Answer now.\n"

SHORT = (UPDATE, ANSWER, DIRECT, RECALL, SEARCH)  # the shipped base was taught these
FULL = (  # instruct models need to be told what the loop is
    """You are reading a long text one section at a time, to solve a problem about the whole of it. You will not see \
earlier sections again: only what your memory holds goes with you. Rewrite the memory: keep everything in it that may \
still help, add what this section says that bears on the problem, directly or as one link of a chain of clues, and \
drop what has become useless. Write names, dates and numbers out in full. Use at most {words} words. Reply with the \
new memory and nothing else.

Problem: {problem}

""",
    """You have read a long text section by section and kept this memory of it. Solve the problem from the memory. \
Think briefly, then end your reply with the shortest exact answer in \\boxed{{}}.

Problem: {problem}

""",
    """Solve the problem from the text below. Think briefly, then end your reply with the shortest exact answer in \
\\boxed{{}}.

Problem: {problem}

""",
    """Below are one section of a text you have read, in which an entity was replaced by [TARGET], and the memory that \
you kept after reading on. Find out from the memory what [TARGET] stands for. Think briefly, then end your reply with \
the entity in \\boxed{{}}.

""",
    """Answer all of the questions below, together. You may search an encyclopaedia, one query a turn. You see your \
last query, the passages it returned and the memory you wrote before them; everything older is gone, so carry over \
whatever you still need. First rewrite the memory in at most {words} words: what has been found for each question, \
what is still missing. Then end your reply with one line, either
Search: your next query
or, once all answers are known or you are told to answer now, the shortest exact answers in the order of the questions:
Answer: \\boxed{{first}} \\boxed{{second}}

Problem: {problem}

""")

Prompt = tuple[list[int], list[int]]


class Prompts:
    """Builds (prefix, given) with one tokenizer and one order. Arguments named *_ids are token lists. wording: SHORT or
    FULL; memory: the tokens that a memory may have: FULL mentions two words for three of them."""

    def __init__(self, tokenizer: Tokenizer, order: str = "section-first", wording: tuple[str, ...] = SHORT,
                 memory: int = 0):
        self.tokenizer, self.order, self.words = tokenizer, order, memory * 2 // 3
        self._update, self._answer, self._direct, self._recall, self._search = wording
        encode = tokenizer.encode
        self.no_memory = encode(NO_MEMORY)
        self._memory, self._section, self._text = encode("Memory:"), encode("Section:\n"), encode("Text:\n")
        self._newline, self._query, self._last = encode("\n"), encode("Query:"), encode(LAST_TURN)
        self.no_result = encode(NO_RESULT)

    def _join(self, head: str, context: list[int], memory_ids: list[int] | None) -> Prompt:
        head_ids, memory = self._head(head), [] if memory_ids is None else self._held(memory_ids)
        if self.order == "section-first":
            return head_ids + context, [*memory, *self.tokenizer.assistant]
        return head_ids, [*memory, *context, *self.tokenizer.assistant]

    def _head(self, text: str) -> list[int]:
        return [*self.tokenizer.user, *self.tokenizer.encode(text)]

    def _held(self, memory_ids: list[int]) -> list[int]:
        return [*self._memory, *self.tokenizer.ordinary(memory_ids), *self._newline]

    def update(self, problem: str, section_ids: list[int], memory_ids: list[int]) -> Prompt:
        head = self._update.format(problem=problem, words=self.words)
        return self._join(head, self._section + section_ids, memory_ids)

    def answer(self, problem: str, memory_ids: list[int]) -> Prompt:
        return self._join(self._answer.format(problem=problem), [], memory_ids)

    def direct(self, problem: str, text_ids: list[int]) -> Prompt:
        prefix, given = self._join(self._direct.format(problem=problem), self._text + text_ids, None)
        return prefix, given

    def recall(self, section_ids: list[int], memory_ids: list[int]) -> Prompt:
        """One prompt for a whole group of G2 samples: all of it is shared, in either order."""
        prefix, given = self._join(self._recall.format(), self._section + section_ids, memory_ids)
        return prefix + given[:-1], given[-1:]

    def search(self, questions: Sequence[str], query: str, result_ids: list[int], memory_ids: list[int],
               last: bool) -> Prompt:
        """A turn of search QA: looks like `update`, with what the last query returned in the section's place. Nothing
        but instruction and questions is shared; query "": the first turn. last: it has to answer."""
        head = self._search.format(problem=" ".join(questions), words=self.words)
        asked = [*self._query, *self.tokenizer.encode(f" {query}"), *self._newline] if query else []
        result, memory = [*asked, *self._section, *result_ids], self._held(memory_ids)
        context = [*result, *memory] if self.order == "section-first" else [*memory, *result]
        given = [*context, *(self._last if last else []), *self.tokenizer.assistant]
        return self._head(head), given

    def overhead(self, problem: str) -> int:
        """Tokens of an update prompt that are neither section nor memory."""
        prefix, given = self.update(problem, [], [])
        return len(prefix) + len(given)
