"""One entry of a suite: what is trained, under which name, and where the results page shows it."""

from __future__ import annotations

from dataclasses import dataclass

PUBLISHED_SIZE = "mini"
NO_LOCALITY = "objectives.terms.activation_locality=null"
NO_CHUNKS = "objectives.terms.chunk_sparsification=null"


@dataclass(frozen=True)
class Experiment:
    """A run to be made. Plain text throughout, so that a list of them reads like the commands a user would type.

    Attributes:
        suite, name: the record lies in `RECORDS/suite/name`. An entry may belong to another suite than the list it
            stands in: the run is then made once and shown in both.
        label: what the results page calls it.
        method, size, seed: as `blockffn train` takes them; an unknown method fails when its turn comes.
        steps: optimiser steps; `None`: as many as the size's recipe has.
        changes: further settings, `KEY=VALUE`.
        groups: tables of the ablation that show the run.
    """

    suite: str
    name: str
    label: str
    method: str = "blockffn"
    size: str = PUBLISHED_SIZE
    seed: int = 1
    steps: int | None = None
    changes: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """The settings that differ from the preset's, as `blockffn train` takes them."""
        steps = [] if self.steps is None else [f"steps={self.steps}"]
        return [f"seed={self.seed}", *steps, *self.changes]
