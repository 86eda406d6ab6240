"""Training of an EAGLE draft on the hidden states of a frozen target, which are computed as they are needed."""
