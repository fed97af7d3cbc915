"""The invented encyclopaedia, and the simulated readers and searchers that a base learns from."""
