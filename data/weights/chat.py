"""The chat template of a checkpoint, rendered once around a user's text that is not there yet.

    around_user(template, variables, where) -> (text before the user's, text behind it, text behind a response)

A template is a program from a stranger: it runs in jinja2's sandbox, as for transformers.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime

from data import InputError

TODAY = datetime(2024, 7, 26)  # for templates that tell the date: Llama 3.1's own default, the same in every run
ANSWER = "response-behind-the-prompt"


def around_user(template: str, variables: dict, where: str) -> tuple[str, str, str]:
    """Renders one user message with the generation prompt (thinking off where the template knows of it).

    -> what stands before the user's text, what follows it up to the response, and what follows a response in a
    conversation ("" where the template can't show one). InputError, one line that begins with `where`, if the
    template fails, or if it does not put every user's text, unchanged, in one place of the same surroundings.
    """
    # Two texts that no template can foresee; quotes, markup, case, accents and inner whitespace are in them so that
    # whatever rewrites the text (escaping, lower case, JSON, split and join) shows. Nothing to strip at the ends:
    # Llama 3 strips, and the texts of this project are placed as ids, behind the template's back.
    mark = hashlib.sha256(template.encode("utf-8", "replace")).hexdigest()
    users = [f"User{mark[:20]} <b>&\"'\\ \u00c9\n\n \t{{{{ 7 * 7 }}}} {mark[20:n]}z" for n in (40, 60)]
    try:
        texts, closing = render(template, variables, users)
    except Exception as e:  # a template can raise anything
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise InputError(f"{where}: the chat template can't be rendered ({why}); give a checkpoint with a sound "
                         f"chat_template") from None
    for user, text in zip(users, texts, strict=True):
        if text.count(user) != 1:
            raise InputError(f"{where}: the chat template shows the user's text {text.count(user)} times as it was "
                             f"given, not once; give a checkpoint whose template leaves it as it is")
    (before, after), other = (text.split(user) for user, text in zip(users, texts, strict=True))
    if [before, after] != other:
        raise InputError(f"{where}: what the chat template puts around the user's text depends on that text; "
                         f"give a checkpoint whose template doesn't")
    return before, after, closing


def render(template: str, variables: dict, users: list[str]) -> tuple[list[str], str]:
    """(a prompt for each user, what follows a response). Raises whatever the template does."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant wrote, for training masks elsewhere; here it is transparent."""

        tags = frozenset({"generation"})

        def parse(self, parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise ValueError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # blocks as transformers trims them, and the helpers that templates written for it expect
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}

    def show(messages: list[dict], prompt: bool) -> str:
        return compiled.render(**variables, messages=messages, tools=None, documents=None,
                               add_generation_prompt=prompt, enable_thinking=False)

    compiled = environment.from_string(template)
    texts = [show([{"role": "user", "content": user}], True) for user in users]
    try:
        talk = [{"role": "user", "content": users[0]}, {"role": "assistant", "content": ANSWER}]
        closing = show(talk, False).partition(ANSWER)[2]
    except Exception:  # some know no assistant; then the checkpoint's eos ends a response
        closing = ""
    return texts, closing
