"""The sampler: pure functions, true permutations, crops within their clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matpac_fast import reference
from matpac_fast.errors import ConfigError, CorpusError
from matpac_fast.train.feed import Feed, read_batch, read_crops
from matpac_fast.train.sampler import Sampler, permute, splitmix64

CPU = torch.device("cpu")


def test_splitmix64_is_the_references():
    counters = np.array([0, 1, 2**31, 2**63, 2**64 - 1], np.uint64)
    want = reference.splitmix64(torch.from_numpy(counters.view(np.int64)))
    assert np.array_equal(splitmix64(counters).view(np.int64), want.numpy())
    assert int(splitmix64(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF  # first output of the published generator


@settings(max_examples=60)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    image = permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
    assert np.array_equal(np.sort(image), np.arange(n, dtype=np.uint64))


def test_permute_sends_every_place_everywhere_alike():
    n, keys = 7, 7_000
    key = np.repeat(np.arange(keys, dtype=np.uint64), n)
    place = np.tile(np.arange(n, dtype=np.uint64), keys)
    image = permute(place, n, key)
    counts = np.bincount((place * np.uint64(n) + image).astype(np.int64), minlength=n * n)
    chi2 = ((counts - keys / n) ** 2 / (keys / n)).sum()
    assert chi2 < 80  # 36 degrees of freedom: 80 has a probability of 4e-5


def test_an_epoch_of_a_huge_corpus_needs_no_memory():
    n = 10**12
    image = permute(np.arange(n - 5, n, dtype=np.uint64), n, np.full(5, 3, np.uint64))
    assert len(set(image.tolist())) == 5
    assert (image < n).all()


def test_every_epoch_draws_each_clip_once_in_an_order_of_its_own():
    frames = np.full(10, 100)
    sampler = Sampler(frames, [100], batch_size=4, seed=1)
    drawn = np.concatenate([sampler.plan(step).clips for step in range(10)]).reshape(4, 10)
    for epoch in drawn:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in drawn}) == 4
    assert [sampler.epoch(step) for step in (0, 1, 5, 10)] == [0.0, 0.4, 2.0, 4.0]


def test_an_epoch_visits_clips_as_often_as_it_is_told_at_other_places():
    frames = np.array([10_000, 10_000, 99, 10_000])
    sampler = Sampler(frames, [100], batch_size=6, seed=1, visits=np.array([1, 3, 5, 2]))
    assert (len(sampler), sampler.n_clips, sampler.n_dropped) == (6, 3, 1)
    for step in range(4):  # an epoch each
        plan = sampler.plan(step)
        assert sorted(plan.clips) == [0, 1, 1, 1, 3, 3]
        assert len(set(plan.starts[plan.clips == 1])) == 3
    once = Sampler(frames, [100], batch_size=6, seed=1, visits=np.ones(4, np.int64)).plan(0)
    assert np.array_equal(once.clips, Sampler(frames, [100], batch_size=6, seed=1).plan(0).clips)


def test_plans_do_not_depend_on_when_or_where_they_are_asked():
    frames = np.arange(1, 40) * 50
    one = Sampler(frames, [400], batch_size=12, seed=5)
    again = Sampler(frames, [400], batch_size=12, seed=5)
    for step in (7, 0, 3, 7):
        whole = one.plan(step)
        parts = [Sampler(frames, [400], 12, 5, rank=rank, world=3).plan(step) for rank in range(3)]
        for name in ("clips", "starts", "index"):
            assert np.array_equal(getattr(whole, name), getattr(again.plan(step), name))
            assert np.array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in parts]))
    assert not np.array_equal(one.plan(0).clips, Sampler(frames, [400], 12, 6).plan(0).clips)


def test_crops_fill_their_clips_evenly():
    sampler = Sampler(np.array([110]), [100], batch_size=1_000, seed=0)
    starts = np.concatenate([sampler.plan(step).starts for step in range(11)])
    counts = np.bincount(starts, minlength=11)
    assert len(counts) == 11  # 0 to 10
    assert ((counts - 1_000) ** 2 / 1_000).sum() < 40  # 10 degrees of freedom: 2e-5


def test_short_clips_are_counted_and_left_out():
    sampler = Sampler(np.array([99, 100, 101, 5]), [100], batch_size=4, seed=0)
    assert (len(sampler), sampler.n_dropped) == (2, 2)
    assert set(np.concatenate([sampler.plan(s).clips for s in range(5)])) == {1, 2}


def test_a_clip_of_no_samples_is_never_drawn():
    assert len(Sampler(np.array([0, 5]), [7], batch_size=4, seed=0, short="repeat")) == 1
    assert len(Sampler(np.array([0, 1]), [7], batch_size=4, seed=0, short="repeat")) == 1  # one sample is enough


def test_of_several_crop_lengths_the_longest_must_fit():
    """A clip between two of them would else be read beyond its end, in the steps that draw the longer."""
    sampler = Sampler(np.array([99, 100, 399, 400]), [100, 400], batch_size=4, seed=0)
    assert (len(sampler), sampler.n_dropped) == (1, 3)
    assert set(np.concatenate([sampler.plan(s).clips for s in range(5)])) == {3}


def test_no_clip_long_enough_says_the_longest():
    with pytest.raises(ConfigError, match=r"no clip is as long as a crop, 100 samples; the longest of 3 has 99"):
        Sampler(np.array([99, 3, 4]), [100], 4, 0)
    with pytest.raises(ConfigError, match="the longest of 0 has 0"):
        Sampler(np.array([], np.int64), [100], 4, 0)


def test_ranks_must_divide_the_batch():
    with pytest.raises(ConfigError, match="a batch of 10 does not divide over 4 processes"):
        Sampler(np.array([100]), [100], 10, 0, world=4)


def test_several_crop_lengths_are_all_drawn_one_a_batch():
    sampler = Sampler(np.full(9, 500), [100, 200, 400], batch_size=2, seed=3)
    drawn = [sampler.plan(step).crop for step in range(60)]
    assert set(drawn) == {100, 200, 400}
    assert drawn == [Sampler(np.full(9, 500), [100, 200, 400], 2, 3).plan(step).crop for step in range(60)]


@pytest.mark.parametrize("short", ["repeat", "zeros"])
def test_short_clips_are_padded_as_named(memory_corpus, short):
    corpus = memory_corpus([3, 10, 7])
    sampler = Sampler(corpus.frames, [7], batch_size=6, seed=0, short=short)
    assert (len(sampler), sampler.n_dropped) == (3, 0)
    plan = sampler.plan(0)
    out = np.full((6, 7), 9, np.int16)
    read_crops(corpus, plan, short, out)
    for row, (clip, start) in enumerate(zip(plan.clips, plan.starts, strict=True)):
        audio = corpus.clips[clip][start:]
        if clip == 0:
            audio = np.concatenate([audio, audio, audio]) if short == "repeat" else np.pad(audio, (0, 4))
        assert np.array_equal(out[row], audio[:7])


def test_feed_hands_out_the_planned_crops_in_order(corpus):
    sampler = Sampler(corpus.frames, [5_360], batch_size=4, seed=2)
    feed = Feed(corpus, sampler, CPU, first=3, last=9)
    for step, batch in zip(range(3, 9), feed, strict=True):
        plan = sampler.plan(step)
        assert np.array_equal(batch.plan.clips, plan.clips)
        assert np.array_equal(batch.wave.numpy(), corpus.gather(plan.clips, plan.starts, 5_360))
        assert batch.index.tolist() == [0, 1, 2, 3]
    feed.close()
    feed.close()


def test_feed_passes_on_what_went_wrong_and_stops_when_closed(corpus):
    def broken(*args, **kwargs):
        raise OSError("the disk is gone")

    sampler = Sampler(corpus.frames, [5_360], batch_size=4, seed=2)
    corpus.gather = broken
    feed = Feed(corpus, sampler, CPU, 0, 10)
    with pytest.raises(OSError, match="the disk is gone"):
        next(feed)
    feed.close()
    assert not feed._thread.is_alive()


def test_clips_that_cannot_be_read_give_their_place_to_others(corpus):
    sampler = Sampler(corpus.frames, [5_360], batch_size=32, seed=2)
    buffer = torch.empty(32 * 5_360, dtype=torch.int16)
    healthy, _, unreadable = read_batch(corpus, sampler, 4, buffer)
    assert unreadable == ()
    corpus.gone = {1, 3, 4}
    plan, wave, unreadable = read_batch(corpus, sampler, 4, buffer)
    assert sorted(unreadable) == ["shards/00000.i16: cut short", "shards/00001.i16: cut short"]
    lost = np.isin(healthy.clips, [1, 3, 4])
    assert 0 < lost.sum() < 32
    assert np.array_equal(plan.clips[~lost], healthy.clips[~lost])
    assert not np.isin(plan.clips, [1, 3, 4]).any()
    assert len(set(plan.clips[lost])) > 1
    assert np.array_equal(wave.numpy(), corpus.gather(plan.clips, plan.starts, 5_360))
    again, _, _ = read_batch(corpus, sampler, 4, buffer)
    assert np.array_equal(again.clips, plan.clips)


def test_what_replaces_a_clip_is_cropped_within_itself():
    frames = np.array([100, 500, 2_000, 7_000])
    sampler = Sampler(frames, [100], batch_size=64, seed=4)
    plan, rows = sampler.plan(3), np.arange(64) % 2 == 0
    first, second = sampler.replace(plan, rows, 0), sampler.replace(plan, rows, 1)
    for other in (first, second):
        assert np.array_equal(other.clips[~rows], plan.clips[~rows])
        assert np.array_equal(other.starts[~rows], plan.starts[~rows])
        assert set(other.clips[rows]) == {0, 1, 2, 3}
        assert ((other.starts >= 0) & (other.starts + 100 <= frames[other.clips])).all()
        assert len(set(other.starts[rows])) > 16
    assert not np.array_equal(first.clips, second.clips)


def test_a_seed_names_the_same_crops_in_every_version():
    """A run that is resumed, or repeated by its seed, must see what it would have seen; recorded."""
    sampler = Sampler(np.array([900, 200, 5_000, 700, 640]), [100, 160], batch_size=6, seed=2**40 + 3)
    plan = sampler.plan(7)
    assert plan.crop == 160
    assert plan.clips.tolist() == [2, 4, 3, 4, 3, 1]
    assert plan.starts.tolist() == [4324, 223, 347, 160, 297, 36]
    other = sampler.replace(plan, np.arange(6) < 3, attempt=1)
    assert other.clips.tolist() == [0, 3, 3, 4, 3, 1]
    assert other.starts.tolist() == [409, 483, 347, 160, 297, 36]


def test_a_corpus_that_cannot_be_read_at_all_is_an_error(corpus):
    corpus.gone = set(range(11))
    sampler = Sampler(corpus.frames, [5_360], batch_size=4, seed=2)
    with pytest.raises(CorpusError, match="cut short"):
        read_batch(corpus, sampler, 0, torch.empty(4 * 5_360, dtype=torch.int16))
