"""Search of the engine settings that are fastest for a bundle on this machine and do not change its predictions."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf2mnn.core.errors import ConfigError, EngineError, suggest
from hf2mnn.core.files import atomic_file
from hf2mnn.core.manifest import Manifest, tool_versions, updated_folder
from hf2mnn.core.progress import steps
from hf2mnn.evaluation.benchmark import interleaved, measure
from hf2mnn.machine.hardware import cores, describe_machine
from hf2mnn.metrics import kl_divergence
from hf2mnn.mnn.bundle import CONFIG
from hf2mnn.mnn.bundle_config import decoder_settings, with_settings
from hf2mnn.mnn.engine import check_bundle, run_worker

Settings = dict[str, Any]
SETTINGS = ("thread_num", "precision", "memory", "attention_mode", "dynamic_option")
"""Settings in the order in which they are tuned; each is tuned with the best values of those before."""
EXACT = {"precision": "high", "memory": "high", "attention_mode": 8, "dynamic_option": 0}
"""The engine's most exact settings, to which all others are compared."""
NEGLIGIBLE = 1e-3
"""Mean KL divergence in nats that is always allowed; int8 weights bring a fifth of it."""
ANSWER_TOKENS = 8
PROMPTS = (
    ("What is 3 plus 4?", False),
    ("Translate into Chinese: the red circle is to the left of the blue square.", False),
    ("三角形是什么颜色？请用一句话回答。", False),
    ("Write a function that returns the n-th Fibonacci number.", False),
    ("How many of these words are colours? " + "red seven green table blue house yellow river " * 24, False),
    ("Describe this image.", True),
    ("左上角是什么颜色？", True),
)
"""Texts, and whether an image precedes each; one is long, so that a quantized KV cache shows."""


@dataclass
class Trial:
    """Settings that are timed with the others of their group."""

    group: str  # setting that varies in the group
    label: str  # its value
    settings: Settings  # all settings
    kld: float  # mean KL divergence in nats from the predictions with `EXACT`
    seconds: list[float] = field(default_factory=list)  # of a request in each repeat; empty if `kld` exceeds the bound
    decode_tokens_per_s: list[float] = field(default_factory=list)  # in each repeat
    peak_mb: list[float] = field(default_factory=list)  # in each repeat
    chosen: bool = False  # whether these settings are the best of their group

    @property
    def median(self) -> float:
        """Median time of a request in seconds."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(high - low)


@dataclass(frozen=True)
class Tuned:
    """Result of the search."""

    trials: list[Trial]
    max_kld: float  # bound on the KL divergence
    changed: Settings  # settings to change
    before: Trial | None  # present settings in the last comparison; None if there was none
    after: Trial | None  # best settings in the last comparison; None if they are not faster
    verdict: str  # result in words


def better(present: Trial, other: Trial) -> bool:
    """Return whether `other` is faster by more than the larger interquartile range of the two."""
    return present.median - other.median > max(present.spread, other.spread)


def choose(present: Trial, others: Sequence[Trial]) -> Trial:
    """Return the most exact of the fastest trials that are better than the present one, else the present one."""
    fastest = min(others, key=lambda trial: trial.median)
    fast = [trial for trial in others if better(present, trial) and not better(trial, fastest)]
    # Divergences with the same first digit are equal; then time decides.
    return min(fast, key=lambda trial: (float(f"{trial.kld:.0e}"), trial.median), default=present)


def values_of(setting: str, quantized: bool, memory: str, available: int) -> list[Any]:
    """Return the values of a setting to try on a CPU of `available` cores; none if the setting has no effect."""
    powers = [2**i for i in range(available.bit_length()) if 2**i < available]
    return {
        "thread_num": [*powers, available],
        "precision": ["low", "normal", "high"],
        # Only quantized weights can stay quantized in memory, and only then are activations rounded.
        "memory": ["low", "high"] if quantized else [],
        "attention_mode": [8, 0, 10],
        "dynamic_option": [0, 1, 2, 8] if quantized and memory == "low" else [],
    }[setting]


class Tuner:
    """Trials of one bundle; `request` has the lengths of prompt and answer and the sides of the image."""

    def __init__(self, bundle: Path, request: dict[str, int], repeats: int, time_limit: float, scratch: Path) -> None:
        self.bundle, self.repeats, self.time_limit, self.scratch = bundle, repeats, time_limit, scratch
        self.request = request
        self.present = decoder_settings(json.loads((bundle / CONFIG).read_text()))
        self._exact: np.ndarray | None = None
        self._klds: dict[str, float] = {}
        self.trials: list[Trial] = []

    def _changed(self, settings: Settings) -> Settings:
        """Return the settings that differ from config.json; others are not written, nor the vision tower's own."""
        return {key: value for key, value in settings.items() if value != self.present[key]}

    def _predictions(self, settings: Settings) -> np.ndarray:
        """Return logits, float32 [positions, vocabulary]."""
        path = self.scratch / "logits.npy"
        job = {"bundle": str(self.bundle), "settings": settings, "image_side": self.request["image_side"]}
        job |= {"prompts": PROMPTS, "limit": ANSWER_TOKENS}
        job |= {"answers": str(self.scratch / "answers.json"), "logits": str(path)}
        try:
            run_worker("hf2mnn.mnn.worker.probe", job, self.time_limit)
        except EngineError as error:
            raise EngineError(f"{self.bundle} cannot be tuned: {error}") from None
        return np.load(path)

    def kld(self, settings: Settings) -> float:
        """Return the mean KL divergence from the predictions with `EXACT`, computed once for each settings."""
        key = json.dumps(settings, sort_keys=True)
        if settings == self.present | EXACT:
            return 0.0
        if key not in self._klds:
            if self._exact is None:
                self._exact = self._predictions(EXACT)
            self._klds[key] = float(kl_divergence(self._exact, self._predictions(self._changed(settings))).mean())
        return self._klds[key]

    def trial(self, group: str, label: Any, settings: Settings) -> Trial:
        """Return a trial with its divergence and without times."""
        return Trial(group, str(label), settings, self.kld(settings))

    def time(self, trials: Sequence[Trial]) -> None:
        """Time trials in interleaved runs; a request is an image, if the model takes one, the prompt and the answer."""
        for _, index in interleaved(range(len(trials)), self.repeats):
            trial = trials[index]
            changed = self._changed(trial.settings)
            measures = measure(self.bundle, changed, **self.request, lengths=(), time_limit=self.time_limit)["measures"]
            trial.seconds.append(measures.get("image_s", 0.0) + measures["first_token_s"] + measures["decode_s"])
            trial.decode_tokens_per_s.append(measures["decode_tokens_per_s"])
            trial.peak_mb += [measures["peak_mb"]] if "peak_mb" in measures else []

    def tune(self, settings: Sequence[str], max_kld: float | None) -> Tuned:
        """Tune one setting after the other, then compare the result with the present settings."""
        formats = Manifest.load(self.bundle).settings
        quantized = any(formats.get(part, {}).get("bits", 32) < 16 for part in ("decoder", "vision"))
        own = self.kld(self.present)
        bound = max(own, NEGLIGIBLE) if max_kld is None else max_kld
        best = start = self.present if own <= bound else {**self.present, **EXACT}
        for setting in steps("tune", settings, "settings"):
            tried = values_of(setting, quantized, best["memory"], cores())
            values = [value for value in tried if value != best[setting]]
            others = [self.trial(setting, value, best | {setting: value}) for value in values]
            allowed = [trial for trial in others if trial.kld <= bound]
            present = self.trial(setting, best[setting], best)
            if allowed:
                self.time([present, *allowed])
                fastest = choose(present, allowed)
                fastest.chosen, best = True, fastest.settings
            self.trials += [present, *others] if others else []
        compared = []
        if best != self.present:
            compared = [self.trial("all", "present", self.present), self.trial("all", "best", best)]
            self.time(compared)
            self.trials += compared
        before, after = compared or (None, None)
        if start != self.present:
            verdict = f"the present settings exceed the bound (mean KLD {own:.2g} > {bound:.2g})"
        elif after is None or not better(before, after):
            verdict, best = "no settings are faster beyond the spread: the present settings stay", self.present
        else:
            verdict = f"a request takes {after.median / before.median:.2f} times as long"
        for trial in compared:
            trial.chosen = trial.settings == best
        return Tuned(self.trials, bound, self._changed(best), before, after if best != self.present else None, verdict)


def write_settings(bundle: Path, changed: Settings, tuned: dict[str, Any]) -> None:
    """Write settings to the bundle's config.json, and their measurements to its manifest."""
    manifest = Manifest.load(bundle)
    config = with_settings(json.loads((bundle / CONFIG).read_text()), changed)
    manifest.results = {**manifest.results, "tuned": tuned}
    with updated_folder(manifest) as folder, atomic_file(folder / CONFIG) as path:
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
    """Find the fastest settings within a bound on the KL divergence, and write them to the bundle unless `dry_run`.

    `max_kld` is the bound in nats; None for the larger of the present settings' own divergence and `NEGLIGIBLE`. Each
    trial of `settings` is timed `repeats` times, in processes that are stopped after `time_limit` seconds.

    Raises:
        ConfigError: A setting is none of `SETTINGS`.
        BundleError: The bundle is not whole.
        EngineError: The engine failed on the bundle.
    """
    for setting in settings:
        if setting not in SETTINGS:
            hint = suggest(setting, SETTINGS, listed=True)
            raise ConfigError(f"setting {setting!r} cannot be tuned; use {', '.join(SETTINGS)}{hint}")
    folder = check_bundle(bundle).folder
    request = {"prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens, "image_side": image_side}
    with tempfile.TemporaryDirectory(prefix="hf2mnn-tune-") as scratch:
        tuned = Tuner(folder, request, repeats, time_limit, Path(scratch)).tune(settings, max_kld)
    if tuned.changed and not dry_run:
        described = {
            "settings": tuned.changed,
            "request": {**request, "repeats": repeats},
            "seconds": {"before": tuned.before.median, "after": tuned.after.median},
            "mean_kld": {"before": tuned.before.kld, "after": tuned.after.kld, "bound": tuned.max_kld},
            "machine": describe_machine() | tool_versions("MNN"),
        }
        write_settings(folder, tuned.changed, described)
    return tuned
