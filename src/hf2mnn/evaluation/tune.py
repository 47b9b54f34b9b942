"""The engine's settings that are fastest for a bundle on this machine, among those that leave its answers alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf2mnn.core.errors import ConfigError, EngineError
from hf2mnn.core.files import whole_file
from hf2mnn.core.manifest import Manifest, changed_folder, tool_versions
from hf2mnn.core.progress import steps
from hf2mnn.evaluation.benchmark import measure, turns
from hf2mnn.machine.hardware import cores, describe_machine
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.engine import check_bundle, run_worker
from hf2mnn.mnn.settings import engine_settings, with_settings

Settings = dict[str, Any]
SETTINGS = ("thread_num", "precision", "memory", "attention_mode", "dynamic_option")
"""In the order in which they are tried; each from the best of those before."""
EXACT = {"precision": "high", "memory": "high", "attention_mode": 8, "dynamic_option": 0}
"""The engine at its most exact: what all others are held against."""
HARMLESS = 1e-3
"""Mean KL divergence in nats that is allowed whatever the present settings have; int8 weights cost a fifth of it."""
ANSWER = 8
PROMPTS = (
    ("What is 3 plus 4?", False),
    ("Translate into Chinese: the red circle is to the left of the blue square.", False),
    ("三角形是什么颜色？请用一句话回答。", False),
    ("Write a function that returns the n-th Fibonacci number.", False),
    ("How many of these words are colours? " + "red seven green table blue house yellow river " * 24, False),
    ("Describe this image.", True),
    ("左上角是什么颜色？", True),
)
"""Texts, and whether an image comes before each; one is long, for what a rounded cache would cost."""


@dataclass
class Trial:
    """Settings as they were timed beside others of their group. `seconds` are requests, in the order of repeats; none
    where it was refused. `kld` is the mean KL divergence in nats of its predictions from those of EXACT.
    """

    group: str
    label: str
    settings: Settings
    kld: float
    seconds: list[float] = field(default_factory=list)
    decode_tokens_per_s: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    chosen: bool = False

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low)


@dataclass(frozen=True)
class Tuned:
    """What came out: all trials in order, the bound on KL divergence, and settings that are to be changed.

    `before` and `after` are the last two trials, timed against each other; `after` is None where nothing was better.
    """

    trials: list[Trial]
    max_kld: float
    changed: Settings
    before: Trial | None
    after: Trial | None
    verdict: str


def better(present: Trial, other: Trial) -> bool:
    """Whether `other` is faster by more than either of the two varies."""
    return present.median - other.median > max(present.spread, other.spread)


def choose(present: Trial, others: Sequence[Trial]) -> Trial:
    """The fastest, where it is faster than the present one beyond the spread; of those as fast, the most exact."""
    fastest = min(others, key=lambda trial: trial.median)
    fast = [trial for trial in others if better(present, trial) and not better(trial, fastest)]
    # A first digit of divergence; below that the answers are as good, and time counts again.
    return min(fast, key=lambda trial: (float(f"{trial.kld:.0e}"), trial.median), default=present)


def values_of(setting: str, quantized: bool, memory: str, available: int) -> list[Any]:
    """The values to try, where the setting means anything on a CPU of `available` cores."""
    powers = [2**i for i in range(available.bit_length()) if 2**i < available]
    return {
        "thread_num": [*powers, available],
        "precision": ["low", "normal", "high"],
        # Only packed weights can be kept packed, and only then are activations rounded.
        "memory": ["low", "high"] if quantized else [],
        "attention_mode": [8, 0, 10],
        "dynamic_option": [0, 1, 2, 8] if quantized and memory == "low" else [],
    }[setting]


class Tuner:
    """Settings of one bundle, timed and held against the exact ones."""

    def __init__(
        self,
        bundle: Path,
        prompt_tokens: int,
        answer_tokens: int,
        image_side: int,
        repeats: int,
        time_limit: float,
        scratch: Path,
    ) -> None:
        self.bundle, self.repeats, self.time_limit, self.scratch = bundle, repeats, time_limit, scratch
        self.request = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "image_side": image_side}
        self.config = json.loads((bundle / CONFIG).read_text())
        self.present = engine_settings(self.config)
        self._exact: np.ndarray | None = None
        self._klds: dict[str, float] = {}
        self.trials: list[Trial] = []

    def _changed(self, settings: Settings) -> Settings:
        """What must be written over config.json; a setting that is as it was stays unwritten, and the vision tower's
        own with it.
        """
        return {key: value for key, value in settings.items() if value != self.present[key]}

    def _predictions(self, settings: Settings) -> np.ndarray:
        """float32 [positions, vocabulary]."""
        path = self.scratch / "logits.npy"
        job = {
            "bundle": str(self.bundle),
            "settings": settings,
            "prompts": PROMPTS,
            "image_side": self.request["image_side"],
            "limit": ANSWER,
            "answers": str(self.scratch / "answers.json"),
            "logits": str(path),
        }
        try:
            run_worker("hf2mnn.mnn.worker.probe", job, self.time_limit)
        except EngineError as error:
            raise EngineError(f"{self.bundle} cannot be tuned: {error}") from None
        return np.load(path)

    def kld(self, settings: Settings) -> float:
        key = json.dumps(settings, sort_keys=True)
        if key not in self._klds:
            if self._exact is None:
                self._exact = self._predictions(EXACT)
            self._klds[key] = float(kl_divergence(self._exact, self._predictions(self._changed(settings))).mean())
        return self._klds[key]

    def trial(self, group: str, label: Any, settings: Settings) -> Trial:
        return Trial(group, str(label), settings, self.kld(settings))

    def time(self, trials: Sequence[Trial]) -> None:
        """Time them in turns; a request is one image, where the model sees, the prompt and the answer."""
        for _, index in turns(range(len(trials)), self.repeats):
            trial = trials[index]
            changed = self._changed(trial.settings)
            found = measure(self.bundle, changed, **self.request, lengths=(), time_limit=self.time_limit)["measures"]
            trial.seconds.append(found.get("image_s", 0.0) + found["first_token_s"] + found["decode_s"])
            trial.decode_tokens_per_s.append(found["decode_tokens_per_s"])
            trial.peak_mb += [found["peak_mb"]] if "peak_mb" in found else []

    def tune(self, settings: Sequence[str], max_kld: float | None) -> Tuned:
        """Each of `settings` in its turn, then the whole against the present one."""
        made = Manifest.load(self.bundle).settings
        quantized = any(made.get(part, {}).get("bits", 32) < 16 for part in ("decoder", "vision"))
        own = self.kld(self.present)
        bound = max(own, HARMLESS) if max_kld is None else max_kld
        start = self.present if own <= bound else {**self.present, **EXACT}
        best = start
        for setting in steps("tune", settings, "settings"):
            values = values_of(setting, quantized, best["memory"], cores())
            others = [
                self.trial(setting, value, {**best, setting: value}) for value in values if value != best[setting]
            ]
            allowed = [trial for trial in others if trial.kld <= bound]
            here = self.trial(setting, best[setting], best)
            if allowed:
                self.time([here, *allowed])
                taken = choose(here, allowed)
                taken.chosen, best = True, taken.settings
            self.trials += [here, *others] if others else []
        return self._decide(start, best, own, bound)

    def _decide(self, start: Settings, best: Settings, own: float, bound: float) -> Tuned:
        before = after = None
        if best != self.present:
            before, after = self.trial("in all", "present", self.present), self.trial("in all", "best", best)
            self.time([before, after])
            self.trials += [before, after]
        if start != self.present:
            verdict = f"the present settings do not keep the bound (mean KLD {own:.2g} > {bound:.2g})"
        elif after is None or not better(before, after):
            verdict, best = "nothing is faster beyond the spread: the present settings stay", self.present
        else:
            verdict = f"a request takes {after.median / before.median:.2f} of the time"
        for trial in (before, after):
            if trial is not None:
                trial.chosen = trial.settings == best
        return Tuned(self.trials, bound, self._changed(best), before, after if best != self.present else None, verdict)


def write_settings(bundle: Path, changed: Settings, tuned: dict[str, Any]) -> None:
    """Put `changed` into the bundle's config.json, and into its manifest what that file is now and why."""
    manifest = Manifest.load(bundle)
    config = with_settings(json.loads((bundle / CONFIG).read_text()), changed)
    manifest.results = {**manifest.results, "tuned": tuned}
    with changed_folder(manifest) as folder, whole_file(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def tune_bundle(
    bundle: Path,
    settings: Sequence[str] = SETTINGS,
    prompt_tokens: int = 256,
    answer_tokens: int = 64,
    image_side: int = 224,
    repeats: int = 5,
    max_kld: float | None = None,
    time_limit: float = 7200,
    dry_run: bool = False,
) -> Tuned:
    """Find the fastest settings that keep `max_kld`, and write them into the bundle unless it is a `dry_run`.

    `max_kld` left out is the present settings' own divergence, or HARMLESS where that is more.

    Raises:
        ConfigError: a setting is none of SETTINGS.
        BundleError, EngineError: the bundle is not whole, or the engine failed on it.
    """
    for setting in settings:
        if setting not in SETTINGS:
            raise ConfigError(f"there is no setting {setting!r} to tune; there are {', '.join(SETTINGS)}")
    folder = check_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="hf2mnn-tune-") as scratch:
        tuner = Tuner(folder, prompt_tokens, answer_tokens, image_side, repeats, time_limit, Path(scratch))
        tuned = tuner.tune(settings, max_kld)
    if tuned.changed and not dry_run:
        described = {
            "settings": tuned.changed,
            "request": {**tuner.request, "repeats": repeats},
            "seconds": {"before": tuned.before.median, "after": tuned.after.median},
            "mean_kld": {"before": tuned.before.kld, "after": tuned.after.kld, "bound": tuned.max_kld},
            "machine": describe_machine() | {"MNN": tool_versions("MNN")["MNN"]},
        }
        write_settings(folder, tuned.changed, described)
    return tuned
