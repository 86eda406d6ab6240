from __future__ import annotations

import pytest
import torch

from blockffn.models.causal_lm import BlockFFNForCausalLM
from tests.inference.speculative.stub_targets import BigramTarget
from tests.models.conftest import tiny_model


@pytest.fixture
def bigram() -> BigramTarget:
    return BigramTarget(torch.randn(12, 12, generator=torch.Generator().manual_seed(5)).mul(2))


@pytest.fixture(scope="session")
def tiny() -> BlockFFNForCausalLM:
    torch.manual_seed(11)
    return tiny_model("gqa", initializer_range=0.5)
