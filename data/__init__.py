"""Everything that comes from outside the model: corpora, entities, tasks, tokenizer, demonstrations."""


class InputError(ValueError):
    """Bad input from the user: one line that says what is wrong, where, and what to do.

    memtrain.py prints the message without a traceback and exits with code 2.
    """
