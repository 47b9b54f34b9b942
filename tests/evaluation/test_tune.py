"""Search of engine settings: choice, bound and written files, with predictions of the real engine and given times."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf2mnn.core.errors import BundleError, ConfigError, EngineError
from hf2mnn.core.manifest import MARKER, Manifest
from hf2mnn.evaluation import tune
from hf2mnn.evaluation.tune import Trial, Tuner, better, choose, tune_bundle, values_of
from hf2mnn.mnn.ask import ask_bundle
from hf2mnn.report.console import print_tuned

SMALL = {"prompt_tokens": 8, "answer_tokens": 2, "image_side": 56, "time_limit": 60}

Times = Callable[[dict[str, Any]], list[float]]
"""Settings over config.json's to seconds of a request, repeat by repeat."""


@pytest.fixture(scope="module", autouse=True)
def shared_predictions() -> Iterator[None]:
    """Compute the predictions of equal bundles and settings once for all tests."""
    known: dict[tuple[str, str], np.ndarray] = {}
    answers: dict[str, str] = {}
    predict = Tuner._predictions

    def shared(self: Tuner, settings: dict[str, Any]) -> np.ndarray:
        digest, path = Manifest.load(self.bundle).digest(), self.scratch / "answers.json"
        key = digest, json.dumps(settings, sort_keys=True)
        if key not in known:
            # The first run of a bundle, with the exact settings, writes the answers that the others are forced to.
            if digest in answers:
                path.write_text(answers[digest])
            known[key] = predict(self, settings)
            answers[digest] = path.read_text()
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "_predictions", shared)
        yield


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[[Times], list[dict[str, Any]]]:
    """Return a function that sets the times of settings on two cores, and returns the list of timed settings."""

    def give(times: Times) -> list[dict[str, Any]]:
        timed: list[dict[str, Any]] = []

        def measure(bundle: Path, settings: dict[str, Any], **_: object) -> dict[str, Any]:
            repeat = timed.count(settings)
            timed.append(settings)
            seconds = times(settings)
            figures = {"image_s": 0.0, "first_token_s": 0.0, "decode_s": seconds[repeat % len(seconds)]}
            return {"measures": {**figures, "decode_tokens_per_s": 1.0}}

        monkeypatch.setattr(tune, "measure", measure)
        monkeypatch.setattr(tune, "cores", lambda: 2)
        return timed

    return give


def faster(key: str, value: Any) -> Times:
    return lambda settings: [0.5 if settings.get(key) == value else 1.0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Choice


def test_the_fastest_setting_is_written_for_both_parts(copy: Path, given: Callable, tmp_path: Path) -> None:
    """The manifest still verifies, the bundle still answers, and a hard link to the old file is unchanged."""
    given(faster("thread_num", 1))
    os.link(copy / "config.json", tmp_path / "shared.json")
    before, answer = contents(copy), ask_bundle(copy, "What?", [], 4)
    tuned = tune_bundle(copy, ["thread_num"], **SMALL)
    config = json.loads((copy / "config.json").read_text())
    assert tuned.changed == {"thread_num": 1}
    assert config == {**json.loads(before["config.json"]), "thread_num": 1, "mllm": {**config["mllm"], "thread_num": 1}}
    assert (tmp_path / "shared.json").read_bytes() == before["config.json"]
    manifest = Manifest.load(copy)
    assert manifest.verify() == copy
    described = manifest.results["tuned"]
    assert described["settings"] == {"thread_num": 1}
    assert described["seconds"] == {"before": 1.0, "after": 0.5}
    changed = {name for name, content in contents(copy).items() if content != before[name]}
    assert changed == {"config.json", "manifest.json"}
    assert ask_bundle(copy, "What?", [], 4) == answer


def test_a_bundle_without_hidden_files_is_tuned(copy: Path, given: Callable) -> None:
    """`cp BUNDLE/* FOLDER` makes such a copy."""
    (copy / MARKER).unlink()
    given(faster("thread_num", 1))
    assert tune_bundle(copy, ["thread_num"], **SMALL).changed == {"thread_num": 1}
    assert Manifest.load(copy).verify() == copy and not (copy / MARKER).exists()


def test_a_dry_run_writes_nothing(copy: Path, given: Callable) -> None:
    given(faster("thread_num", 1))
    before = contents(copy)
    assert tune_bundle(copy, ["thread_num"], **SMALL, dry_run=True).changed == {"thread_num": 1}
    assert contents(copy) == before


def test_within_the_spread_the_present_settings_stay(copy: Path, given: Callable) -> None:
    """The median is a tenth lower, the repeats differ by a half."""
    given(lambda settings: [0.6, 0.9, 1.2] if settings else [0.8, 1.0, 1.4])
    before = contents(copy)
    tuned = tune_bundle(copy, ["thread_num", "precision"], **SMALL)
    assert tuned.changed == {} and tuned.after is None
    assert "the present settings stay" in tuned.verdict
    assert contents(copy) == before


def test_a_lucky_setting_fails_the_second_timing(copy: Path, given: Callable) -> None:
    """It is fast in its group (5 repeats), and slow in the comparison with the present settings."""
    given(lambda settings: [0.5] * 5 + [1.0] * 5 if settings else [1.0])
    tuned = tune_bundle(copy, ["thread_num"], **SMALL)
    assert [trial.median for trial in tuned.trials if trial.group == "all"] == [1.0, 1.0]
    assert tuned.changed == {} and "the present settings stay" in tuned.verdict


def test_settings_are_tried_from_the_best_so_far(copy: Path, given: Callable) -> None:
    """Runs are interleaved within a group."""
    timed = given(faster("thread_num", 2))
    tune_bundle(copy, ["thread_num", "precision"], **SMALL, repeats=2)
    present, one, two = {}, {"thread_num": 1}, {"thread_num": 2}
    low, normal = {**two, "precision": "low"}, {**two, "precision": "normal"}
    assert timed[:6] == [present, one, two, one, two, present]
    assert timed[6:12] == [two, low, normal, low, normal, two]
    assert timed[12:] == [present, two, two, present]


@pytest.mark.parametrize(
    ("present", "other", "chosen"),
    [
        ([1.0, 1.0, 1.0], [0.9, 0.9, 0.9], True),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], False),
        ([1.0, 1.0, 1.0], [1.1, 1.1, 1.1], False),
        ([0.8, 1.0, 1.2], [0.9, 0.9, 0.9], False),
        ([1.0, 1.0, 1.0], [0.7, 0.9, 1.1], False),
        ([0.98, 1.0, 1.02], [0.88, 0.9, 0.92], True),
    ],
)
def test_better_is_beyond_the_spread_of_both(present: list[float], other: list[float], chosen: bool) -> None:
    assert better(Trial("", "", {}, 0, present), Trial("", "", {}, 0, other)) is chosen


def test_of_equally_fast_settings_the_most_exact_is_chosen() -> None:
    present = Trial("", "present", {}, 3e-4, [10.0, 10.0, 10.1])
    coarse, exact = Trial("", "coarse", {}, 5e-4, [5.0, 5.1, 5.3]), Trial("", "exact", {}, 1e-4, [5.0, 5.2, 5.3])
    late = Trial("", "late", {}, 0, [9.0, 9.1, 9.2])
    assert choose(present, [coarse, exact, late]) is exact
    assert choose(present, [coarse, late]) is coarse
    assert choose(exact, [late, present]) is exact
    # Equal divergence up to rounding: the faster.
    again = Trial("", "again", {}, 1e-4 + 1e-9, [5.0, 5.1, 5.2])
    assert choose(present, [exact, again]) is again


def test_measured_times_decide_by_the_same_rule(copy: Path) -> None:
    tuned = tune_bundle(copy, ["thread_num"], **SMALL, repeats=2, dry_run=True)
    assert all(len(trial.seconds) == 2 and min(trial.seconds) > 0 for trial in tuned.trials)
    assert all(len(trial.peak_mb) in (0, 2) for trial in tuned.trials)
    assert bool(tuned.changed) == (tuned.after is not None)
    if tuned.after:
        assert better(tuned.before, tuned.after)


# Bound and errors


def test_a_setting_that_exceeds_the_bound_is_refused(copy: Path, given: Callable) -> None:
    """An 8-bit KV cache is not timed, although it is the fastest."""
    timed = given(faster("attention_mode", 10))
    before = contents(copy)
    tuned = tune_bundle(copy, ["attention_mode"], **SMALL, max_kld=0)
    refused = next(trial for trial in tuned.trials if trial.label == "10")
    assert refused.kld > 0 and refused.seconds == [] and not refused.chosen
    assert {"attention_mode": 10} not in timed
    assert tuned.changed == {} and contents(copy) == before
    printed = io.StringIO()
    print_tuned(tuned, written=True, file=printed)
    assert "refused" in printed.getvalue() and "written" not in printed.getvalue()


@pytest.mark.slow
def test_a_wider_bound_allows_it(copy: Path, given: Callable) -> None:
    given(faster("attention_mode", 10))
    tuned = tune_bundle(copy, ["attention_mode"], **SMALL, max_kld=10, dry_run=True)
    assert tuned.changed == {"attention_mode": 10}
    assert tuned.before.kld == 0 < tuned.after.kld


def test_present_settings_above_the_bound_are_replaced_by_exact_ones(
    int8: Path, given: Callable, tmp_path: Path
) -> None:
    """This holds at any speed. The default bound is that of the present settings."""
    int8 = Path(shutil.copytree(int8, tmp_path / "int8"))
    given(lambda settings: [2.0 if settings else 1.0])
    assert tune_bundle(int8, ["thread_num"], **SMALL, dry_run=True).changed == {}
    tuned = tune_bundle(int8, ["thread_num"], **SMALL, max_kld=1e-12)
    assert tuned.changed == {"precision": "high", "memory": "high"}
    assert tuned.before.kld > 1e-12 >= tuned.after.kld
    assert "exceed the bound" in tuned.verdict
    config = json.loads((int8 / "config.json").read_text())
    assert config["memory"] == config["mllm"]["memory"] == "high"
    Manifest.load(int8).verify()


def test_settings_without_effect_are_not_tried() -> None:
    assert values_of("memory", False, "high", 2) == values_of("dynamic_option", False, "high", 2) == []
    assert values_of("memory", True, "low", 2) == ["low", "high"]
    assert values_of("dynamic_option", True, "high", 2) == []
    assert [values_of("thread_num", True, "low", cores) for cores in (1, 2, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_an_unknown_setting_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match=r"setting 'chunk' cannot be tuned; use thread_num"):
        tune_bundle(copy, ["chunk"])


def test_a_bundle_that_is_not_whole_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"config\.json was changed: llm_config is null"):
        tune_bundle(copy)


def test_a_bundle_that_does_not_load_is_named(copy: Path) -> None:
    (copy / "llm.mnn").write_bytes(b"no graph")
    manifest = Manifest.load(copy)
    manifest.folder = None
    manifest.save(copy)
    with pytest.raises(EngineError, match=rf"{copy} cannot be tuned: "):
        tune_bundle(copy, ["thread_num"], **SMALL)
