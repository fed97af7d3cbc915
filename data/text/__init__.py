"""Text from outside: corpora, the hub, question files, entities, retrieval."""
