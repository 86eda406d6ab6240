"""How fast a model decodes: ways of decoding side by side, peers, and advice for this machine."""
