"""The probe in batches: a linear layer trained as papers do, written out here once more with torch's own parts."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from matpac_fast.cli import probe as cli_probe
from matpac_fast.cli import study as cli_study
from matpac_fast.cli._probe import probe_config
from matpac_fast.study import linear
from matpac_fast.study.batches import BatchedFold
from matpac_fast.study.linear import ProbeConfig
from matpac_fast.tasks import Fold

from .test_linear import blobs, run, standardised, three_folds

BATCHES = ProbeConfig((1e-2,), (0.0,), seeds=2, steps=40, check_every=1, patience=5, batch=16)


def trained(x: np.ndarray, targets: np.ndarray, fold: Fold, config: ProbeConfig, seed: int, multi: bool = False):
    """The layer of least validation loss, and the number of passes."""
    generator = torch.Generator().manual_seed(seed)
    values, goal, k = torch.from_numpy(x), torch.from_numpy(targets), targets.max() + 1 if not multi else 3
    layer = nn.Linear(values.shape[1], int(k), dtype=torch.float64)
    drawn = torch.rand(values.shape[1] + 1, int(k), generator=generator, dtype=torch.float64)
    with torch.no_grad():  # nn.Linear draws from the same range
        layer.weight.copy_((2 * drawn[:-1].T - 1) / values.shape[1] ** 0.5)
        layer.bias.copy_((2 * drawn[-1] - 1) / values.shape[1] ** 0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=config.learning_rates[0], weight_decay=config.decays[0])

    def loss(clips):
        logits, wanted = layer(values[clips]), goal[clips]
        if not multi:
            return F.cross_entropy(logits, wanted)
        known = ~wanted.isnan()
        each = F.binary_cross_entropy_with_logits(logits, wanted.nan_to_num().double(), reduction="none")
        return (each * known).sum() / len(clips)

    best, kept, since = np.inf, None, 0
    for done in range(config.steps + 1):
        if (now := loss(np.sort(fold.valid)).item()) < best:
            best, kept, since = now, copy.deepcopy(layer), 0
        else:
            since += 1
        if since == config.patience or done == config.steps:
            return kept, done
        train = np.sort(fold.train)
        for clips in np.array_split(
            train[torch.randperm(len(train), generator=generator).numpy()],
            np.arange(config.batch, len(train), config.batch),
        ):
            optimizer.zero_grad()
            loss(clips).backward()
            optimizer.step()
    raise AssertionError


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_it_is_the_loop_that_papers_have(decay):
    values, targets = blobs(spread=4.0)
    config = dataclasses.replace(BATCHES, decays=(decay,))
    folds = three_folds(len(targets))[:2]
    found = run(values, targets, folds, config, 3)
    passes = []
    for f, fold in enumerate(folds):
        x = standardised(values, fold)
        for seed in range(2):
            layer, done = trained(x, targets, fold, config, seed)
            passes.append(done)
            expected = layer(torch.from_numpy(x[fold.test])).softmax(1)
            torch.testing.assert_close(found.scores[f][seed], expected.detach(), rtol=0, atol=1e-9)
            given = values[fold.test] @ found.weights[f][seed, :-1] + found.weights[f][seed, -1]
            torch.testing.assert_close(given.softmax(1), expected.detach(), rtol=0, atol=1e-9)
    assert min(passes) < config.steps  # stopped early: what is kept is not the last


def test_of_several_labels_only_the_known_ones_count():
    values, _ = blobs(n=150, seed=3)
    random = np.random.default_rng(4)
    targets = ((values.numpy() - values.numpy().mean(0)) @ random.normal(size=(12, 3)) > 0).astype(np.float32)
    targets[random.random(targets.shape) < 0.3] = np.nan
    fold = three_folds(150)[0]
    found = run(values, targets, [fold], BATCHES, 3, "mAP")
    x = standardised(values, fold)
    for seed in range(2):
        layer, _ = trained(x, targets, fold, BATCHES, seed, multi=True)
        expected = layer(torch.from_numpy(x[fold.test])).sigmoid()
        torch.testing.assert_close(found.scores[0][seed], expected.detach(), rtol=0, atol=1e-9)


def test_validation_chooses_among_rates_and_the_pairs_are_apart():
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    config = dataclasses.replace(BATCHES, learning_rates=(1e-5, 1e-2), decays=(0.0, 1e-3))
    found = run(values, targets, [fold], config, 3)
    alone = {}
    for rate in config.learning_rates:
        for decay in config.decays:
            one = dataclasses.replace(config, learning_rates=(rate,), decays=(decay,))
            alone[rate, decay] = run(values, targets, [fold], one, 3)
    for seed in range(2):
        best = min(alone, key=lambda pair: float(alone[pair].valid[0, seed]))
        assert tuple(found.chosen[0, seed].tolist()) == best
        assert torch.equal(found.scores[0][seed], alone[best].scores[0][seed])
        assert best[0] == 1e-2


def test_the_default_learning_rates_of_the_commands_learn():
    """On features as wide and as correlated as embeddings, where with those of all rows at once no pass is better than
    the initial weights: 14 % of six classes."""
    random = np.random.default_rng(0)
    targets = np.arange(300) % 6
    few = 0.5 * random.normal(size=(6, 30))[targets] + random.normal(size=(300, 30))
    values = torch.from_numpy(few @ random.normal(size=(30, 600)))
    config = dataclasses.replace(probe_config(None, "0", 32, 1, True), steps=60)
    fold = three_folds(300)[0]
    (scores,) = run(values, targets, [fold], config, 6).scores[0]
    assert (scores.argmax(1).numpy() == targets[fold.test]).mean() > 0.6
    assert probe_config(None, "0", None, 1, True).learning_rates == ProbeConfig().learning_rates
    assert probe_config("0.3", "0", 32, 1, True).learning_rates == (0.3,)


@pytest.mark.parametrize("command", [cli_probe, cli_study])
def test_help_says_how_long_it_is_trained(command):
    text = " ".join((command.main.__doc__ or "").split())
    config = probe_config(None, "0", 32, 1, True)
    assert f"until {config.patience} passes have not lowered the validation loss, {config.steps} passes at most" in text


def test_a_row_counts_by_its_share_of_its_clip():
    """One batch a pass, so that the order does not matter: rows twice with half the seconds each are the rows once."""
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    config = dataclasses.replace(BATCHES, batch=1000, standardize=False)
    once = run(values / 5, targets, [fold], config, 3)
    clip = np.repeat(np.arange(len(targets)), 2)
    twice = run(values[clip] / 5, targets, [fold], config, 3, clip=clip)
    torch.testing.assert_close(once.scores[0], twice.scores[0], rtol=0, atol=1e-6)
    # What was seen for a thousandth of a clip moves next to nothing, whatever it holds.
    rows = torch.stack([values, 100 * values.flip(0)], 1).flatten(0, 1) / 5
    seconds = np.tile([1.0, 1e-7], len(targets))
    odd = run(rows, targets, [fold], config, 3, clip=clip, seconds=seconds)
    torch.testing.assert_close(once.scores[0], odd.scores[0], rtol=0, atol=1e-3)


def test_threads_share_a_batch_only_where_it_is_large_enough(monkeypatch):
    """All rows and the whole grid together would be."""
    values, targets = blobs()
    seen, before, train = [], torch.get_num_threads(), BatchedFold._train
    monkeypatch.setattr(BatchedFold, "_train", lambda *a: seen.append(torch.get_num_threads()) or train(*a))
    torch.set_num_threads(2)
    try:
        for shared in (16 * 12 * 3 + 1, 16 * 12 * 3):  # rows, columns, classes
            monkeypatch.setattr(linear, "_SHARED", shared)
            run(values, targets, three_folds(len(targets))[:1], BATCHES, 3)
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)
    finally:
        torch.set_num_threads(before)


def test_same_bits_twice_and_seeds_differ():
    values, targets = blobs()
    folds = three_folds(len(targets))
    one, two = (run(values, targets, folds, BATCHES, 3, dtype=torch.float32) for _ in range(2))
    for mine, other in zip(one.scores + one.weights, two.scores + two.weights, strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(one.scores[0][0], one.scores[0][1])


@pytest.mark.parametrize(
    ("rates", "seeds", "told"),
    [
        (
            (1e4, 1e5),
            2,
            "at learning rates 10000, 100000 for 2 of 2 seeds, .* try smaller learning rates, such as 1000, or larger",
        ),
        (
            (2e4,),
            1,
            "at learning rate 20000 for 1 of 1 seed, whose scores are those of untrained .*, such as 2000, or",
        ),
    ],
)
def test_learning_rates_that_learn_nothing_are_told(rates, seeds, told):
    values, targets = blobs()
    config = dataclasses.replace(BATCHES, learning_rates=rates, seeds=seeds)
    with pytest.warns(UserWarning, match=told):
        found = run(values, targets, three_folds(len(targets))[:1], config, 3)
    assert found.untrained.tolist() == [[True] * seeds]
