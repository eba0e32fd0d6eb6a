"""The network as pcfast reads it: a chain of PC layers, each a chain of operations."""
