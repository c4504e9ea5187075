"""The likelihood of given ids beside the sum written out, whatever the batch and the lengths of its rows."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unitok.sampling.likelihood import log_likelihood


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def test_it_is_the_sum_over_the_chosen_ids(lm):
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 50, n), rng.random(n) < 0.6) for n in (3, 17, 8, 1, 9)]
    expected = []
    for ids, counts in rows:
        with torch.no_grad():
            logp = lm(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        expected.append(sum(logp[i - 1, ids[i]].item() for i in range(1, len(ids)) if counts[i]))
    for batch_size in (1, 2, 128):
        assert log_likelihood(lm, rows, batch_size) == pytest.approx(expected, abs=1e-4)
    assert log_likelihood(lm, []).shape == (0,)
