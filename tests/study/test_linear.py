"""The batched probe: scikit-learn's weights, early stopping, masks, and test clips that choose nothing."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from matpac_fast.errors import ConfigError
from matpac_fast.study import linear
from matpac_fast.study.batches import BatchedFold
from matpac_fast.study.linear import FoldProbes, ProbeConfig, Rows, probe
from matpac_fast.tasks import Fold

EXACT = ProbeConfig(learning_rates=(0.3,), decays=(0.03,), seeds=2, steps=1000, check_every=1000)
QUICK = ProbeConfig(learning_rates=(0.03,), decays=(1e-2, 1e-1), seeds=2, steps=60)


def blobs(n: int = 120, d: int = 12, k: int = 3, seed: int = 0, spread: float = 1.2) -> tuple[torch.Tensor, np.ndarray]:
    random = np.random.default_rng(seed)
    targets = np.arange(n) % k
    centres = random.normal(size=(k, d))
    scale, shift = 10 ** random.uniform(-1, 1, d), random.normal(size=d)
    return torch.from_numpy((centres[targets] + spread * random.normal(size=(n, d))) * scale + shift), targets


def three_folds(n: int) -> list[Fold]:
    part = np.arange(n) // 5 % 3
    return [Fold(*(np.flatnonzero(part == (i + j) % 3) for j in (2, 0, 1))) for i in range(3)]


def run(values, targets, folds, config, k, metric="accuracy", clip=None, dtype=torch.float64, seconds=None):
    groups = np.arange(len(targets)).astype(str)
    clip = np.arange(len(targets)) if clip is None else clip
    seconds = np.ones(len(values)) if seconds is None else seconds
    return probe(Rows(values, clip, seconds), targets, groups, folds, k, config, metric, dtype=dtype)


def standardised(values: torch.Tensor, fold: Fold) -> np.ndarray:
    learn = values[fold.train]
    return ((values - learn.mean(0)) / learn.std(0, correction=0)).numpy()


@pytest.mark.parametrize(("shared", "expected"), [(linear._SHARED, 1), (0, 2)])
def test_threads_share_only_what_is_large_enough(monkeypatch, shared, expected):
    values, targets = blobs()
    seen, before, train = [], torch.get_num_threads(), FoldProbes.run
    monkeypatch.setattr(linear, "_SHARED", shared)
    monkeypatch.setattr(FoldProbes, "run", lambda *a: seen.append(torch.get_num_threads()) or train(*a))
    torch.set_num_threads(2)
    try:
        run(values, targets, three_folds(len(targets)), QUICK, 3)
        assert (set(seen), torch.get_num_threads()) == ({expected}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("d", [12, 150])  # fewer columns than training clips, and more
def test_single_label_is_scikit_learns(d):
    values, targets = blobs(d=d)
    folds = three_folds(len(targets))
    found = run(values, targets, folds, EXACT, 3)
    for f, fold in enumerate(folds):
        x = standardised(values, fold)
        model = LogisticRegression(C=1 / (0.03 * len(fold.train)), tol=1e-10, max_iter=5000)
        model.fit(x[fold.train], targets[fold.train])
        expected = model.predict_proba(x[fold.test])
        for seed in range(2):
            assert np.abs(found.scores[f][seed].numpy() - expected).max() < 1e-4
            given = values[fold.test] @ found.weights[f][seed, :-1] + found.weights[f][seed, -1]
            assert np.abs(given.softmax(1).numpy() - expected).max() < 1e-4


def test_multi_label_is_scikit_learns_on_the_known_labels():
    values, _ = blobs(n=150, seed=3)
    random = np.random.default_rng(4)
    hidden = random.normal(size=(12, 3))
    targets = ((values.numpy() - values.numpy().mean(0)) @ hidden > 0).astype(np.float32)
    targets[random.random(targets.shape) < 0.3] = np.nan
    fold = three_folds(150)[0]
    found = run(values, targets, [fold], EXACT, 3, "mAP")
    x = standardised(values, fold)
    for k in range(3):
        known = fold.train[~np.isnan(targets[fold.train, k])]
        # The loss is a mean over training clips, so a class with fewer known labels is penalised by as much.
        model = LogisticRegression(C=1 / (0.03 * len(fold.train)), tol=1e-10, max_iter=5000).fit(
            x[known], targets[known, k]
        )
        assert np.abs(found.scores[0][0, :, k].numpy() - model.predict_proba(x[fold.test])[:, 1]).max() < 1e-4


def test_several_rows_of_a_clip_share_its_weight_and_its_scores_are_averaged():
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    copies = np.repeat(np.arange(len(targets)), 1 + np.arange(len(targets)) % 3)
    raw = dataclasses.replace(EXACT, standardize=False)
    once = run(values / 5, targets, [fold], raw, 3)
    many = run(values[copies] / 5, targets, [fold], raw, 3, clip=copies)
    assert torch.allclose(once.scores[0], many.scores[0], atol=1e-4)
    # And windows that differ are averaged as probabilities.
    apart = torch.cat([values, values.flip(1)])
    clip = np.concatenate([np.arange(len(targets))] * 2)
    found = run(apart / 5, targets, [fold], raw, 3, clip=clip)
    each = [
        (half[fold.test] / 5) @ found.weights[0][0, :-1] + found.weights[0][0, -1] for half in (values, values.flip(1))
    ]
    assert torch.allclose(found.scores[0][0], (each[0].softmax(1) + each[1].softmax(1)) / 2, atol=1e-6)


@pytest.mark.parametrize("attentive", [False, True])
def test_a_row_counts_by_its_seconds(attentive):
    """As the last window of a clip, of which there may be a few milliseconds."""
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    config = dataclasses.replace(EXACT, attentive=attentive, standardize=False)
    once = run(values / 5, targets, [fold], config, 3)
    clip = np.repeat(np.arange(len(targets)), 2)
    rows = torch.stack([values, values.flip(0)], 1).flatten(0, 1) / 5
    found = run(rows, targets, [fold], config, 3, clip=clip, seconds=np.tile([10.0, 1e-9], len(targets)))
    assert torch.allclose(once.scores[0], found.scores[0], atol=1e-4)
    even = run(rows, targets, [fold], config, 3, clip=clip)
    assert not torch.allclose(once.scores[0], even.scores[0], atol=0.1)


def test_the_whole_grid_at_once_is_each_probe_on_its_own():
    values, targets = blobs(spread=4.0)
    folds = three_folds(len(targets))
    grid = ProbeConfig(learning_rates=(0.01, 0.1), decays=(1e-4, 1e-2, 1.0), seeds=2, steps=200, patience=1000)
    together = run(values, targets, folds, grid, 3)
    for lr in grid.learning_rates:
        for decay in grid.decays:
            alone = run(values, targets, folds, dataclasses.replace(grid, learning_rates=(lr,), decays=(decay,)), 3)
            assert (together.valid <= alone.valid + 1e-12).all()
            for f in range(3):
                for seed in range(2):
                    if together.chosen[f, seed].tolist() == [lr, decay]:
                        assert torch.allclose(together.scores[f][seed], alone.scores[f][seed], atol=1e-10)
    assert (together.chosen[..., 1] > 1e-4).any()  # noisy features want a penalty


def test_early_stopping_keeps_the_best_step():
    values, targets = blobs(n=90, d=40)
    wrong = np.random.default_rng(1).random(90) < 0.4  # labels that can only be learnt by heart
    targets = np.where(wrong, (targets + 1) % 3, targets)
    folds = three_folds(90)
    config = ProbeConfig(learning_rates=(0.1,), decays=(0.0,), seeds=1, steps=400)
    stopped = run(values, targets, folds, config, 3)
    heart = run(values, targets, folds, dataclasses.replace(config, check_every=400), 3)
    assert (stopped.valid <= heart.valid).all()
    assert (stopped.valid < heart.valid - 0.05).any()
    for fold, weights, least in zip(folds, stopped.weights, stopped.valid, strict=True):
        logits = values[fold.valid] @ weights[0, :-1] + weights[0, -1]
        of_these = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets[fold.valid]))
        torch.testing.assert_close(of_these, least[0], rtol=1e-6, atol=0)


def test_scores_are_in_the_order_of_the_test_clips():
    """Which need not be sorted: a fold of one's own."""
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    order = np.random.default_rng(0).permutation(len(fold.test))
    mixed = dataclasses.replace(fold, test=fold.test[order], valid=fold.valid[::-1], train=fold.train[::-1])
    before, after = run(values, targets, [fold], QUICK, 3), run(values, targets, [mixed], QUICK, 3)
    torch.testing.assert_close(after.scores[0], before.scores[0][:, order])
    torch.testing.assert_close(after.valid_score, before.valid_score)


def test_test_clips_choose_nothing():
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    before = run(values, targets, [fold], QUICK, 3)
    values, targets = values.clone(), targets.copy()
    values[fold.test] = 100.0 * torch.randn(len(fold.test), 12, dtype=torch.float64)
    targets[fold.test] = 0
    after = run(values, targets, [fold], QUICK, 3)
    assert torch.equal(before.weights[0], after.weights[0])
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.valid_score, after.valid_score)


@pytest.mark.parametrize("kind", [{}, {"attentive": True}, {"batch": 16}])
@pytest.mark.parametrize("d", [12, 150])
def test_validation_clips_choose_and_nothing_else(kind, d):
    """Not the features' means, nor their axes: to axes that they helped to find they would fit better than others."""
    values, targets = blobs(d=d)
    fold = three_folds(len(targets))[0]
    config = ProbeConfig(learning_rates=(0.1,), decays=(1e-2,), seeds=2, steps=20, check_every=20, **kind)
    before = run(values, targets, [fold], config, 3)
    values = values.clone()
    noise = torch.randn(len(fold.valid), d, dtype=torch.float64)
    values[fold.valid] += 0.1 * values.std(0) * noise
    after = run(values, targets, [fold], config, 3)
    assert not after.untrained.any()
    assert torch.equal(before.weights[0], after.weights[0])
    assert not torch.equal(before.valid, after.valid)


def test_validation_clips_fit_as_other_clips_do():
    """Where there are more columns than clips, and training ends long before it is done."""
    values, targets = blobs(n=600, d=1500, k=10, spread=4.0)
    values, part = values.float(), np.arange(600) // 10 % 6
    fold = Fold(np.flatnonzero(part < 2), np.flatnonzero(part > 2), np.flatnonzero(part == 2))
    found = run(values, targets, [fold], ProbeConfig(decays=(0.1,), seeds=1), 10, dtype=torch.float32)
    truth = torch.from_numpy(targets[fold.test])
    test = torch.stack([F.nll_loss(scores.log(), truth) for scores in found.scores[0]])
    torch.testing.assert_close(found.valid[0].double(), test, rtol=0.1, atol=0)


def test_a_task_without_validation_clips_holds_out_whole_groups_anew_for_each_seed():
    values, targets = blobs(n=240)
    groups = np.array([f"g{i // 6}" for i in range(240)])
    fold = Fold(np.arange(180), np.arange(180, 240))
    parts = linear.split(fold, targets, groups, 2)
    assert [list(seeds) for _, seeds in parts] == [[0], [1]]
    assert not np.array_equal(*(part.valid for part, _ in parts))
    for part, _ in parts:
        assert 18 <= len(part.valid) <= 42
        assert not set(groups[part.valid]) & set(groups[part.train])
        assert sorted([*part.train, *part.valid]) == list(fold.train)
        assert part.test is fold.test
    config = dataclasses.replace(QUICK, patience=1000)
    found = probe(
        Rows(values, np.arange(240), np.ones(240)), targets, groups, [fold], 3, config, "accuracy", dtype=torch.float64
    )
    # Each as on a task with these validation clips.
    alone = run(values, targets, [parts[0][0]], dataclasses.replace(config, seeds=1), 3)
    torch.testing.assert_close(found.scores[0][:1], alone.scores[0], rtol=0, atol=1e-9)
    assert found.scores[0].shape == (2, 60, 3)


@pytest.mark.parametrize("several", [False, True])  # rows of a clip
def test_each_seed_chooses_by_a_resample_of_the_validation_groups(several):
    values, targets = blobs(spread=3.0)
    groups = np.arange(120) // 4
    fold = three_folds(120)[0]
    fold = dataclasses.replace(fold, valid=fold.valid[::-1])
    clip = np.repeat(np.arange(120), 2 if several else 1)
    rows = Rows(values[torch.from_numpy(clip)], clip, np.ones(len(clip)))
    config = dataclasses.replace(QUICK, seeds=3, learning_rates=(0.1, 0.3), decays=(0.1,))
    made = FoldProbes(rows, targets, groups, fold, 3, config, torch.device("cpu"), torch.float64, range(3))
    weight = torch.randn(made.train.x.shape[1], 6, 3, dtype=torch.float64)
    loss = made._loss(weight, torch.zeros(6, 3, dtype=torch.float64))
    each = linear.losses(torch.einsum("nr,rgk->ngk", made.valid.x, weight), made.valid.goal)  # (R, G)
    drawn = []
    for seed in range(3):
        counts = dict(zip(fold.valid, linear._resampled(groups[fold.valid], seed), strict=True))
        shares = torch.tensor([counts[i] for i in made.valid.clip])
        for g in (seed, 3 + seed):
            torch.testing.assert_close(loss[g], (each[:, g] * shares).mean())
        assert all(counts[i] == counts[j] for i in counts for j in counts if groups[i] == groups[j])
        assert sum(counts.values()) == pytest.approx(len(counts))
        drawn.append(tuple(counts.values()))
    assert len(set(drawn)) == 3
    # One seed alone, and all that are trained in batches, choose by all.
    plain = FoldProbes(rows, targets, groups, fold, 3, config, torch.device("cpu"), torch.float64, range(1))
    torch.testing.assert_close(plain._loss(weight[:, :1], torch.zeros(1, 3, dtype=torch.float64))[0], each[:, 0].mean())
    batches = dataclasses.replace(config, batch=16)
    assert BatchedFold(
        rows, targets, groups, fold, 3, batches, torch.device("cpu"), torch.float64, range(3)
    ).valid.weight.shape == (len(made.valid.clip), 1)


def hold_out(groups: str, multi: bool = False) -> list[np.ndarray]:
    """What each of four seeds holds out; `groups` of the training clips, a letter each, the capitals being class 1;
    with `multi` the others are of no class."""
    names = np.array(list(groups))
    n, targets = len(names), np.array([int(name.isupper()) for name in groups])
    targets, names = np.append(targets, 0), np.append(names, "test")
    targets = np.stack([0 * targets, targets], 1).astype(np.float32) if multi else targets
    return held_of(Fold(np.arange(n), np.array([n])), targets, names, 4)


def held_of(fold: Fold, targets: np.ndarray, groups: np.ndarray, seeds: int) -> list[np.ndarray]:
    return [part.valid for part, _ in linear.split(fold, targets, groups, seeds) if part.valid is not None]


def test_where_no_class_has_two_groups_nothing_can_be_held_out():
    with pytest.raises(ConfigError, match="no class has training clips in two groups, .*the split valid"):
        hold_out("aaaaBBBB")


def test_what_is_held_out_of_several_labels_has_one_that_is_trained():
    for valid in hold_out("abcdefghijkLmnopqrstuV", multi=True):
        assert len({11, 21} & set(valid.tolist())) == 1
    with pytest.raises(ConfigError, match="no class has training clips in two groups"):
        hold_out("abcdefghijkLLLLmnopqr", multi=True)


def test_a_class_of_one_large_group_leaves_another_to_be_held_out():
    for valid in hold_out("aaaaaaaaBBCC"):
        assert set(valid.tolist()) in ({8, 9}, {10, 11})


def test_a_group_with_a_class_of_its_own_is_trained_on_whole():
    """As of speakers that say the same words, one of whom says one more."""
    n = 49
    groups = np.array([f"g{i // 8}" for i in range(n)])  # the last is the test clip's
    targets = np.arange(n) % 2
    targets[8:10] = 2
    parts = held_of(Fold(np.arange(n - 1), np.array([n - 1])), targets, groups, 20)
    held = [sorted(set(groups[valid].tolist())) for valid in parts]
    assert {len(names) for names in held} == {1}
    assert {name for names in held for name in names} == {"g0", "g2", "g3", "g4", "g5"}
    assert {len(valid) for valid in parts} == {8}


def test_same_bits_twice_and_inputs_unchanged():
    values, targets = blobs()
    values = values.float()
    kept, folds = values.clone(), three_folds(len(targets))
    one, two = (run(values, targets, folds, QUICK, 3, dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.scores, two.scores, strict=True))
    assert torch.equal(values, kept)


@pytest.mark.parametrize("kind", [{}, {"attentive": True}, {"batch": 16}])
@pytest.mark.parametrize("metric", ["accuracy", "mAP"])
def test_the_applications_default_device_changes_nothing(kind, metric):
    values, targets = blobs()
    goal = targets if metric == "accuracy" else np.eye(3, dtype=np.float32)[targets]
    config = dataclasses.replace(QUICK, steps=20, **kind)
    want = run(values, goal, three_folds(len(targets)), config, 3, metric)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        found = run(values, goal, three_folds(len(targets)), config, 3, metric)
    assert all(map(torch.equal, [*found.scores, found.valid, found.chosen], [*want.scores, want.valid, want.chosen]))


def test_constant_and_not_finite_columns():
    values, targets = blobs()
    folds = three_folds(len(targets))
    plain = run(values, targets, folds, QUICK, 3)
    for value in (3.7, -3.7, 0.1):
        constant = torch.cat([values, torch.full((len(values), 1), value, dtype=torch.float64)], 1)
        found = run(constant, targets, folds, QUICK, 3)
        assert all(torch.allclose(a, b) for a, b in zip(plain.scores, found.scores, strict=True))
    values[5, 3] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        run(values, targets, folds, QUICK, 3)


@pytest.mark.parametrize("attentive", [False, True])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_clip_without_an_embedding_is_an_error(part, attentive):
    values, targets = blobs()
    fold = three_folds(len(targets))[0]
    gone = getattr(fold, part)[0]
    clip = np.delete(np.arange(len(targets)), gone)
    with pytest.raises(ConfigError, match=f"1 of 120 clips have no embedding, such as clip {gone}"):
        run(values[clip], targets, [fold], dataclasses.replace(QUICK, attentive=attentive), 3, clip=clip)


@pytest.mark.parametrize(
    "change", [dict(seeds=0), dict(steps=0), dict(batch=0), dict(decays=()), dict(learning_rates=(0.0,))]
)
def test_settings_that_cannot_be(change):
    with pytest.raises(ConfigError):
        ProbeConfig(**change)


@pytest.mark.parametrize("standardize", [True, False])
def test_more_features_than_are_held_at_a_time_make_no_difference(monkeypatch, standardize):
    values, targets = blobs()
    config = dataclasses.replace(QUICK, standardize=standardize)
    whole = run(values, targets, three_folds(len(targets)), config, 3)
    monkeypatch.setattr(linear, "_FEATURES", 12 * 12)
    monkeypatch.setattr(linear, "CELLS", 100)
    parts = run(values, targets, three_folds(len(targets)), config, 3)
    assert torch.equal(whole.chosen, parts.chosen)
    for one, other in zip(whole.scores + whole.weights, parts.scores + parts.weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_the_share_of_the_steps_is_told():
    values, targets = blobs()
    told = []
    rows, names = Rows(values, np.arange(len(targets)), np.ones(len(targets))), np.arange(len(targets))
    config = dataclasses.replace(QUICK, steps=20, check_every=10)
    probe(rows, targets, names, three_folds(len(targets))[:2], 3, config, "accuracy", progress=told.append)
    assert told == [0.0, 0.25, 0.5, 0.5, 0.75, 1.0]


def test_weights_that_nothing_could_better_are_told():
    random = np.random.default_rng(0)
    values, targets = torch.from_numpy(random.standard_normal((90, 600))), random.integers(0, 9, 90)
    fold = Fold(np.arange(30), np.arange(60, 90), np.arange(30, 60))
    config = ProbeConfig(learning_rates=(10.0,), decays=(0.0,), seeds=2)
    with pytest.warns(UserWarning, match="no step lowered the validation loss at learning rate 10 for 2 of 2 seeds"):
        run(values, targets, [fold], config, 9)
    values, targets = blobs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of these every seed's are better than as they were drawn
        found = run(values, targets, three_folds(len(targets)), QUICK, 3)
    assert not found.untrained.any()


def test_a_probe_stops_once_no_check_was_better_for_so_long():
    random = np.random.default_rng(0)
    values, targets = torch.from_numpy(random.standard_normal((90, 600))), random.integers(0, 9, 90)
    fold, told = Fold(np.arange(30), np.arange(60, 90), np.arange(30, 60)), []
    config = ProbeConfig(learning_rates=(10.0,), decays=(0.0,), seeds=1, steps=100, check_every=10, patience=3)
    rows = Rows(values, np.arange(90), np.ones(90))
    with pytest.warns(UserWarning, match="no step lowered"):  # the first check, of step 0, is the best
        probe(rows, targets, np.arange(90).astype(str), [fold], 9, config, "accuracy", progress=told.append)
    assert told == pytest.approx([0.0, 0.1, 0.2, 0.3])
