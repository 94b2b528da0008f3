"""An exhaustive check of the replicated section log: a small model of the protocol and of its mistakes."""
