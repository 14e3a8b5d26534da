"""A transform of the crops: the same on any number of processes and after any interruption, and however it fails."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import textwrap

import pytest
import torch
from ranks import on_ranks
from runs import assert_same_curve, assert_same_run, curve
from stops import after

from matpac_fast.errors import ConfigError
from matpac_fast.train import TrainingError, Transform, pretrain, read_log
from matpac_fast.train.feed import Feed
from matpac_fast.train.sampler import Sampler
from matpac_fast.train.transform import transform_name


def docstring_example():
    """The gain that Transform's docstring shows, as it stands there."""
    code = re.search(r"^    +def gain.*?(?=\n *$)", Transform.__doc__, re.M | re.S)[0]
    names = {"torch": torch}
    exec(textwrap.dedent(code), names)
    return names["gain"]


gain = functools.partial(docstring_example(), batch_size=4)


class Fade:
    def __call__(self, crops, index, step):
        return crops // (1 + index[:, None]).to(torch.int16)


def ranked(corpus, folder, model, config, transform):
    result = pretrain(corpus, folder, model, config, "cpu", transform=transform)
    return result.step, result.finished


def gained(rank, *args):  # a function that exec made cannot be sent
    return ranked(*args, gain)


def test_two_processes_draw_the_curve_of_one(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "plain", model_config, train_config, "cpu")
    pretrain(corpus, tmp_path / "one", model_config, train_config, "cpu", transform=gain)
    config = dataclasses.replace(train_config, grad_accumulation=2)
    assert on_ranks(2, gained, corpus, tmp_path / "two", model_config, config) == {0: (12, True), 1: (12, True)}
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    plain, one = curve(tmp_path / "plain"), curve(tmp_path / "one")
    assert all(abs(a["loss"] - b["loss"]) > 1e-4 for a, b in zip(plain, one, strict=True))


def test_resume_is_exact(tmp_path, corpus, model_config, train_config):
    config = dataclasses.replace(train_config, crop_frames=(16, 32))
    pretrain(corpus, tmp_path / "whole", model_config, config, transform=gain)
    pretrain(corpus, tmp_path / "parts", model_config, config, transform=gain, stop=after(5))
    assert pretrain(corpus, tmp_path / "parts", model_config, config, transform=gain).finished
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(("device", "world"), [("cpu", 1), ("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.gpu)])
def test_it_gets_the_crops_their_numbers_and_the_step(corpus, device, world):
    """Of each process its part; what it does to its arguments afterwards or to its own memory changes no batch."""
    heard, kept = [], torch.empty(4 // world, 5_360, dtype=torch.int16)

    def transform(crops, index, step):
        heard.append((step, index.tolist(), crops.clone()))
        index.fill_(-1)
        crops.fill_(7)
        return kept.fill_(step)

    for rank in range(world):
        sampler = Sampler(corpus.frames, [5_360], 4, seed=2, rank=rank, world=world)
        feed = Feed(corpus, sampler, torch.device(device), 3, 6, depth=4, transform=transform)
        feed._thread.join(10)  # all is read before the first is looked at
        for step, batch in zip(range(3, 6), feed, strict=True):
            asked, index, crops = heard.pop(0)
            plan = sampler.plan(step)
            assert asked == step
            assert index == batch.index.tolist() == list(range(4))[rank * 4 // world :][: 4 // world]
            assert torch.equal(crops, torch.from_numpy(corpus.gather(plan.clips, plan.starts, 5_360)))
            assert (batch.wave == step).all()
        assert not heard
        feed.close()


def test_crops_may_be_changed_in_place(corpus):
    sampler = Sampler(corpus.frames, [5_360], 4, seed=2)
    feed = Feed(corpus, sampler, torch.device("cpu"), 0, 1, transform=lambda crops, index, step: crops.neg_())
    plan = sampler.plan(0)
    assert torch.equal(next(feed).wave, -torch.from_numpy(corpus.gather(plan.clips, plan.starts, 5_360)))
    feed.close()


def full(crops):
    raise RuntimeError("can't allocate memory")


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda crops: None, "returned NoneType at step 6; expected the crops, int16 (4, 5360) on cpu"),
        (
            lambda crops: crops.float(),
            "returned float32 (4, 5360) on cpu at step 6; expected int16 (4, 5360) on cpu: r",
        ),
        (lambda crops: crops[:, 1:], "returned int16 (4, 5359) on cpu at step 6; expected int16 (4, 5360) on cpu"),
        (lambda crops: crops.resize_(2, 10), "returned int16 (2, 10) on cpu at step 6; expected int16 (4, 5360) on c"),
        (lambda crops: crops.to("meta"), "returned int16 (4, 5360) on meta at step 6; expected int16 (4, 5360) on cpu"),
        (lambda crops: {}["key"], "failed at step 6: KeyError: 'key'"),
        (lambda crops: next(iter(())), "failed at step 6: StopIteration: "),
        (full, "failed at step 6: RuntimeError: can't allocate memory"),
    ],
)
def test_what_is_wrong_with_it_ends_the_run(tmp_path, corpus, model_config, train_config, returned, says):
    wrong = {6}

    def broken(crops, index, step):
        return returned(crops) if step in wrong else crops

    name = "test_what_is_wrong_with_it_ends_the_run.<locals>.broken"
    with pytest.raises(TrainingError, match=re.escape(f"transform {name} {says}")):
        pretrain(corpus, tmp_path / "run", model_config, train_config, transform=broken)
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert records[-1]["event"] == "failed"
    assert says in records[-1]["text"]
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6]  # what came before it was trained on
    assert (tmp_path / "run" / "latest").read_text() == "step-00000004\n"
    wrong.clear()
    assert pretrain(corpus, tmp_path / "run", model_config, train_config, transform=broken).finished


def failing(rank, *args):
    def broken(crops, index, step):
        return crops[:0] if rank == 1 and step == 6 else crops

    return ranked(*args, broken)


def test_where_it_fails_on_one_process_all_end(tmp_path, corpus, model_config, train_config):
    answers = on_ranks(2, failing, corpus, tmp_path / "run", model_config, train_config)
    says = "transform failing.<locals>.broken returned int16 (0, 5360) on cpu at step 6"
    assert answers[0].startswith(f"PeerError: rank 1: {says}")
    assert answers[1].startswith(f"TrainingError: {says}")
    assert (tmp_path / "run" / "latest").read_text() == "step-00000004\n"


def unlike(rank, *args):
    return ranked(*args, gain if rank else None)


def test_processes_with_different_ones_are_refused(tmp_path, corpus, model_config, train_config):
    answers = on_ranks(2, unlike, corpus, tmp_path / "run", model_config, train_config)
    assert set(answers.values()) == {
        "ConfigError: the processes have different transforms, None, gain: give all the same"
    }


def test_another_one_is_refused(tmp_path, corpus, model_config, train_config):
    run = tmp_path / "run"
    pretrain(corpus, run, model_config, train_config, transform=gain, stop=after(2))
    assert json.loads((run / "config.json").read_text())["transform"] == "gain"
    assert read_log(run / "log.jsonl")[0]["config"]["transform"] == "gain"
    says = (
        r"transform is 'gain' there and {} here\. To go on with it, give pretrain the transform gain\. For another run"
    )
    with pytest.raises(ConfigError, match=says.format("None")):
        pretrain(corpus, run, model_config, train_config)
    with pytest.raises(ConfigError, match=says.format("'Fade'")):
        pretrain(corpus, run, model_config, train_config, transform=Fade())
    (run / "config.json").write_text(json.dumps(without(run)))  # as a run that knew of none
    with pytest.raises(
        ConfigError, match="transform is None there and 'gain' here. To go on with it, give pretrain no t"
    ):
        pretrain(corpus, run, model_config, train_config, transform=gain)
    assert pretrain(corpus, run, model_config, train_config).finished


def without(run):
    config = json.loads((run / "config.json").read_text())
    del config["transform"]
    return config


def test_what_it_is_called(tmp_path, corpus, model_config, train_config):
    assert transform_name(None) is None
    assert transform_name(Fade()) == "Fade"
    assert transform_name(Fade().__call__) == "Fade.__call__"
    assert transform_name(functools.partial(Fade())) == "Fade"
    with pytest.raises(ConfigError, match=r"transform is 3; expected a function of \(crops, index, step\), or None"):
        pretrain(corpus, tmp_path / "run", model_config, train_config, transform=3)
    assert not (tmp_path / "run").exists()
