import dataclasses
from typing import Any

import pytest
import torch
from helpers import fresh_seed

from fmoe import random
from fmoe.models import deepseek_v3
from fmoe.models.sampling import sample

CONFIG = dataclasses.replace(
    deepseek_v3.preset("debug"),
    dim=16,
    num_layers=2,
    hidden_dim=8,
    vocab_size=8,
    max_seq_len=12,
    init_std=0.5,
)


@pytest.fixture
def params() -> Any:
    return deepseek_v3.init(CONFIG, fresh_seed(), dtype=torch.float64)


def test_temperature_zero_takes_the_likeliest_and_sees_a_window(params: Any) -> None:
    text = prompt = torch.randint(8, (3, 4))
    for _ in range(6):
        logits, _ = deepseek_v3.forward(params, text[:, max(0, text.shape[1] - 5) :], CONFIG)
        text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], 1)
    sampled = sample(params, prompt, CONFIG, num_tokens=6, key=random.key(0), temperature=0, window=5)
    assert torch.equal(sampled, text)
    drawn = sample(params, prompt, CONFIG, num_tokens=6, key=random.key(1), top_k=1, window=5)
    assert torch.equal(drawn, text)


def test_longer_texts_than_the_model_takes(params: Any) -> None:
    sampled = sample(params, torch.randint(8, (1, 3)), CONFIG, num_tokens=20, key=random.key(0))
    assert sampled.shape == (1, 23)
    assert 0 <= sampled.min() <= sampled.max() < 8


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 99)])
def test_tokens_are_drawn_with_their_probabilities(
    params: Any, temperature: float, top_k: int | None
) -> None:
    count = 4000
    prompt = torch.randint(8, (1, 4))
    logits, _ = deepseek_v3.forward(params, prompt, CONFIG)
    last = logits[0, -1] / temperature
    if top_k == 3:
        last[last.argsort()[:-3]] = -torch.inf
    expected = last.softmax(0)
    drawn = sample(
        params,
        prompt.expand(count, 4),
        CONFIG,
        num_tokens=1,
        key=random.key(fresh_seed()),
        temperature=temperature,
        top_k=top_k,
    )
    shares = torch.bincount(drawn[:, -1], minlength=8) / count
    assert (shares[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 6 * deviation + 1e-3).all()


def test_keys_repeat_and_differ_and_global_randomness_is_left_alone(params: Any) -> None:
    options: Any = {"num_tokens": 30, "temperature": 5.0}
    prompt = torch.randint(8, (2, 2))
    before = torch.get_rng_state()
    first = sample(params, prompt, CONFIG, key=random.key(3), **options)
    assert torch.equal(first, sample(params, prompt, CONFIG, key=random.key(3), **options))
    assert not torch.equal(first, sample(params, prompt, CONFIG, key=random.key(4), **options))
    assert torch.equal(torch.get_rng_state(), before)


def test_options_out_of_range_are_refused(params: Any) -> None:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    for options, expected in [
        ({"num_tokens": -1}, "sample: num_tokens: got -1, expected at least 0"),
        ({"temperature": -0.1}, "sample: temperature: got -0.1, expected at least 0"),
        ({"top_k": 0}, "sample: top_k: got 0, expected None or at least 1"),
        ({"window": 13}, "sample: window: got 13, expected None or 1 to max_seq_len=12"),
    ]:
        with pytest.raises(ValueError, match=expected):
            sample(params, prompt, CONFIG, **{"num_tokens": 1, "key": random.key(0), **options})
    with pytest.raises(ValueError, match=r"sample: prompt: got shape \(1, 0\), expected \(B, L\), L > 0"):
        sample(params, prompt[:, :0], CONFIG, num_tokens=1, key=random.key(0))
    with pytest.raises(ValueError, match=r"expected torch.int64 of shape \(B, L\)"):
        sample(params, prompt.int(), CONFIG, num_tokens=1, key=random.key(0))
    with pytest.raises(ValueError, match=r"sample: key: got 0, expected torch.int64 of shape \(2,\)"):
        sample(params, prompt, CONFIG, num_tokens=1, key=0)  # type: ignore[arg-type]
