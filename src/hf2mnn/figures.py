"""Registry of figures: the one list from which table, console, page, comparison, gates, schema and docs derive.

To add a figure, add one entry to `FIGURES` and the code that computes it. A figure of positions or answers with a
`column` (and, for a percentile, a `quantile`) needs no code beyond that column. `python -m hf2mnn.figures` prints
docs/figures.md. This module imports nothing of the package, so that config can build the schema of the gates from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# Where a figure is shown. Docs list every figure.
TABLE, CONSOLE, COMPARISON = "table", "console", "comparison"
COMPARED, EVERYWHERE = (TABLE, COMPARISON), (TABLE, CONSOLE, COMPARISON)

# Captions of the page's tables.
PREDICTIONS, PROBABILITIES = "How close the predictions are", "Probabilities, images, tokens"
GREEDY, SPEED = "Answers", "Times and memory"

# What a figure is measured on.
POSITIONS, ANSWERS, IMAGES, CACHE = "positions", "answers", "images", "cache"
BUNDLE, BENCHMARK, DIAGNOSIS, VERDICT = "bundle", "benchmark", "diagnosis", "verdict"
EVALUATED = (POSITIONS, ANSWERS, IMAGES, CACHE)
"""Sources of the figures in an evaluation's summary.json."""

HIGHER, LOWER = "higher", "lower"


def short(value: float) -> str:
    """Format a number with two significant digits."""
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def readable_size(size: float) -> str:
    """Format bytes as B, kB, MB or GB of 1000."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


@dataclass(frozen=True)
class Unit:
    """Unit of a figure: format of its values, and the bounds that a gate can have."""

    format: Callable[[float], str] = short
    lowest: float | None = 0
    highest: float | None = None
    integer: bool = False
    scale: tuple[str, float] = ("", 1)  # Head of a column of measurements and the factor to its unit: ms for seconds.


UNITS = {
    "nats": Unit(),
    "share": Unit(lambda share: f"{100 * share:.1g} %" if 0 < share < 0.001 else f"{100 * share:.1f} %", highest=1),
    "ratio": Unit("{:.4f}".format),
    "correlation": Unit("{:.5f}".format, lowest=-1, highest=1),
    "relative error": Unit(),
    "tokens": Unit("{:.1f}".format),
    "count": Unit("{:.0f}".format, integer=True),
    "yes/no": Unit(lambda value: "yes" if value else "no", highest=1, integer=True),
    "bytes": Unit(readable_size, integer=True),
    "s": Unit(scale=("ms", 1000)),
    "tokens/s": Unit(lambda value: f"{value:.0f}" if value >= 10 else f"{value:.1f}", scale=("tok/s", 1)),
    "MB": Unit("{:.0f}".format, scale=("MB", 1)),
}


@dataclass(frozen=True)
class Gate:
    """Default bounds of a gate, a key under `gates` of config.yaml; None for no bound."""

    default: float | None = None
    onnxruntime: float | None = None  # For the ONNX graphs in ONNX Runtime; `default` is for every variant.


@dataclass(frozen=True)
class Figure:
    """One measured number of a conversion."""

    name: str  # Key in summary.json, column of summary.csv, key of its gate.
    label: str  # Name on the page.
    unit: str  # Key of UNITS.
    better: str | None  # HIGHER or LOWER; None where neither end is better.
    source: str  # What it is measured on.
    meaning: str  # Definition.
    shown: tuple[str, ...] = ()  # TABLE, CONSOLE, COMPARISON.
    page: str = ""  # Caption of the page's table that shows it.
    head: str = ""  # Column head in the console, where `label` is too long.
    column: str = ""  # Column of the table of positions or answers that the figure averages.
    quantile: float | None = None  # Quantile of the column, in place of its mean.
    interval: bool = False  # Whether the table has its 95 % interval, as columns NAME_low and NAME_high.
    pytorch: float | None = None  # PyTorch's own value, for the table's first row.
    gate: Gate | None = None
    optional: bool = False  # A missing value keeps the gate: there is no image, tokenizer or bundle to measure.

    @property
    def columns(self) -> list[str]:
        """Columns of the figure in the table."""
        return [self.name, f"{self.name}_low", f"{self.name}_high"] if self.interval else [self.name]

    @property
    def description(self) -> str:
        """Meaning, and which end is better."""
        return f"{self.meaning} {self.better.capitalize()} is better." if self.better else self.meaning

    @property
    def measure_head(self) -> str:
        """Column head in a table of the benchmark: label and unit."""
        return f"{self.label} {UNITS[self.unit].scale[0]}"

    def keeps(self, value: float | None, bound: float) -> bool:
        """Return whether a value keeps a bound; NaN keeps none."""
        if value is None:
            return self.optional
        return value >= bound if self.better == HIGHER else value <= bound


# fmt: off
FIGURES = {figure.name: figure for figure in (
    # Teacher-forced logits: PyTorch in float32 is p, the conversion is q.
    Figure("top1_agreement", "top-1", "share", HIGHER, POSITIONS, "Positions whose most likely token is PyTorch's.",
           EVERYWHERE, PREDICTIONS, column="same_top", pytorch=1, gate=Gate(0.95, onnxruntime=0.999)),
    Figure("top5_overlap", "top-5 overlap", "share", HIGHER, POSITIONS,
           "PyTorch's five most likely tokens that are among the conversion's five.",
           COMPARED, PREDICTIONS, column="top5_overlap", pytorch=1),
    Figure("mean_kld", "mean KLD", "nats", LOWER, POSITIONS, "Mean KL divergence KL(p || q) over positions.",
           EVERYWHERE, PREDICTIONS, column="kld", interval=True, pytorch=0, gate=Gate(0.1, onnxruntime=1e-6)),
    Figure("median_kld", "median KLD", "nats", LOWER, POSITIONS, "Median of the KL divergence over positions.",
           COMPARED, PREDICTIONS, column="kld", quantile=0.5),
    Figure("p90_kld", "90 % KLD", "nats", LOWER, POSITIONS, "90th percentile of the KL divergence over positions.",
           column="kld", quantile=0.9),
    Figure("p95_kld", "95 % KLD", "nats", LOWER, POSITIONS, "95th percentile of the KL divergence over positions.",
           column="kld", quantile=0.95),
    Figure("p99_kld", "99 % KLD", "nats", LOWER, POSITIONS, "99th percentile of the KL divergence over positions.",
           COMPARED, PREDICTIONS, column="kld", quantile=0.99),
    Figure("p999_kld", "99.9 % KLD", "nats", LOWER, POSITIONS, "99.9th percentile of the KL divergence over positions.",
           column="kld", quantile=0.999),
    Figure("max_kld", "largest KLD", "nats", LOWER, POSITIONS, "Largest KL divergence of a position.",
           (TABLE,), PREDICTIONS, column="kld", quantile=1.0),
    Figure("rms_probability_change", "RMS Δp", "share", LOWER, POSITIONS,
           "Root mean square of q - p of PyTorch's token.", COMPARED, PROBABILITIES),
    Figure("perplexity", "perplexity", "ratio", None, POSITIONS, "Perplexity of the conversion on PyTorch's answers."),
    Figure("reference_perplexity", "PyTorch's perplexity", "ratio", None, POSITIONS,
           "Perplexity of PyTorch on its own answers."),
    Figure("perplexity_ratio", "perplexity ratio", "ratio", None, POSITIONS,
           "Perplexity over PyTorch's, on PyTorch's answers; 1 is equal.", (TABLE,), PROBABILITIES),
    Figure("logprob_correlation", "correlation", "correlation", HIGHER, POSITIONS,
           "Pearson correlation with PyTorch's log-probabilities of its tokens.", (), PROBABILITIES),
    # Greedy answers, decoded with the conversion's own KV cache.
    Figure("greedy_match", "greedy match", "share", HIGHER, ANSWERS,
           "Whole answers that equal PyTorch's, token for token.",
           EVERYWHERE, GREEDY, head="greedy", column="greedy_match", pytorch=1, gate=Gate(onnxruntime=0.99)),
    Figure("common_prefix", "common prefix", "share", HIGHER, ANSWERS,
           "Part of PyTorch's answer before the first different token, mean.", (), GREEDY, column="prefix_share"),
    Figure("common_prefix_tokens", "common prefix, tokens", "tokens", HIGHER, ANSWERS,
           "Tokens of PyTorch's answer before the first different token, mean.", column="prefix_tokens"),
    Figure("repetition", "repetition", "share", LOWER, ANSWERS, "Repeated 4-grams of an answer (seq-rep-4), mean.",
           column="repetition"),
    Figure("degenerate", "degenerate", "share", LOWER, ANSWERS, "Answers that end in a loop where PyTorch's does not.",
           COMPARED, GREEDY, column="degenerate"),
    Figure("task_accuracy", "task accuracy", "share", HIGHER, ANSWERS,
           "Mean score of labelled examples, each by its own metric.", EVERYWHERE, GREEDY, head="task", column="score"),
    Figure("reference_accuracy", "PyTorch's task accuracy", "share", HIGHER, ANSWERS,
           "PyTorch's mean score of labelled examples.", column="reference_score"),
    Figure("answers_lost", "answers lost", "count", LOWER, VERDICT, "Right answers fewer than PyTorch has.",
           gate=Gate(onnxruntime=1), optional=True),
    Figure("accuracy_lost", "accuracy lost", "share", LOWER, VERDICT, "Task accuracy below PyTorch's.",
           gate=Gate(0.05), optional=True),
    # Image embeddings of the conversion's vision tower, for the pixels that transformers prepares.
    Figure("vision_cosine", "vision cosine", "correlation", HIGHER, IMAGES,
           "Cosine of image embeddings with PyTorch's, mean over image tokens.", EVERYWHERE, PROBABILITIES,
           head="vision", pytorch=1, gate=Gate(0.99, onnxruntime=0.9999), optional=True),
    Figure("worst_vision_cosine", "lowest vision cosine", "correlation", HIGHER, IMAGES,
           "Cosine of the worst image token.", (TABLE,)),
    Figure("vision_error", "vision error", "relative error", LOWER, IMAGES,
           "Relative L2 error of image embeddings, mean over image tokens.", COMPARED, PROBABILITIES),
    Figure("cache_parity", "KV cache", "nats", LOWER, CACHE,
           "Largest KL divergence between two ways of filling the KV cache.", (TABLE, CONSOLE),
           gate=Gate(0.05, onnxruntime=1e-6), optional=True),
    # The engine's own tokenizer, chat template and position ids.
    Figure("tokenizer_match", "tokenizer match", "share", HIGHER, ANSWERS,
           "Prompts that the bundle's tokenizer encodes to transformers' tokens.", COMPARED, PROBABILITIES,
           column="tokenizer_match", gate=Gate(1), optional=True),
    Figure("template_match", "template match", "share", HIGHER, ANSWERS,
           "Conversations that the engine renders to the same prompt as transformers.", COMPARED, PROBABILITIES,
           column="template_match", gate=Gate(1), optional=True),
    Figure("as_called_match", "as called: match", "share", HIGHER, ANSWERS,
           "Answers of a plain call of the engine that equal PyTorch's.", (TABLE,), GREEDY, column="as_called_match"),
    Figure("as_called_accuracy", "as called: accuracy", "share", HIGHER, ANSWERS,
           "Task accuracy of a plain call of the engine.", EVERYWHERE, GREEDY, head="as called",
           column="as_called_score"),
    # The bundle and its diagnosis.
    Figure("bytes", "size", "bytes", LOWER, BUNDLE, "Size of the folder.", (TABLE, CONSOLE)),
    Figure("nc4hw4_decoder", "NC4HW4 decoder", "yes/no", HIGHER, BUNDLE,
           "1 where the decoder's graph has MNN's NC4HW4 layout, 0 where it stays in the slower NCHW.", (TABLE,),
           gate=Gate(1), optional=True),
    Figure("findings", "findings", "count", LOWER, DIAGNOSIS, "Causes of error that the diagnosis names.", (TABLE,),
           gate=Gate(0), optional=True),
    # Medians of the benchmark.
    Figure("load_s", "load", "s", LOWER, BENCHMARK, "Time to load the bundle.", COMPARED, SPEED),
    Figure("first_token_s", "first token", "s", LOWER, BENCHMARK, "Time from the prompt to the first token.",
           COMPARED, SPEED),
    Figure("prefill_s", "prefill", "s", LOWER, BENCHMARK, "Time of the prompt's forward pass."),
    Figure("prefill_tokens_per_s", "prefill", "tokens/s", HIGHER, BENCHMARK, "Prompt tokens a second.",
           COMPARED, SPEED),
    Figure("decode_s", "decode", "s", LOWER, BENCHMARK, "Time to decode the answer."),
    Figure("decode_tokens_per_s", "decode", "tokens/s", HIGHER, BENCHMARK, "Answer tokens a second.",
           EVERYWHERE, SPEED, head="tok/s"),
    Figure("image_s", "image", "s", LOWER, BENCHMARK, "Time of an image: normalization, patches and vision tower."),
    Figure("vision_s", "vision", "s", LOWER, BENCHMARK, "Time of the vision tower alone.", COMPARED, SPEED),
    Figure("base_mb", "process", "MB", None, BENCHMARK, "Memory of the process before it loads the bundle."),
    Figure("peak_mb", "peak", "MB", LOWER, BENCHMARK, "Peak memory of the process."),
    Figure("bundle_mb", "memory", "MB", LOWER, BENCHMARK, "Peak memory less the memory before the bundle is loaded.",
           COMPARED, SPEED),
)}
# fmt: on
"""All figures by name, in the order of the table's columns."""


def measured_on(*sources: str) -> list[Figure]:
    """Return the figures of some sources."""
    return [figure for figure in FIGURES.values() if figure.source in sources]


def shown_in(where: str) -> list[Figure]:
    """Return the figures that are shown in `TABLE`, `CONSOLE` or `COMPARISON`."""
    return [figure for figure in FIGURES.values() if where in figure.shown]


def on_page(*captions: str) -> list[Figure]:
    """Return the figures of the page's tables with these captions."""
    return [figure for figure in FIGURES.values() if figure.page in captions]


def gated() -> list[Figure]:
    """Return the figures that can have a gate."""
    return [figure for figure in FIGURES.values() if figure.gate]


HEADER = """# Figures

Made by `python -m hf2mnn.figures`; do not edit. [Evaluation](evaluation.md) says how figures are measured.
A gate's default holds for every variant; the last column is the default for the ONNX graphs in ONNX Runtime.

| figure | unit | better | measured on | meaning | gate | ONNX Runtime |
|---|---|---|---|---|---|---|
"""


def markdown() -> str:
    """Return docs/figures.md."""
    text = HEADER
    for figure in FIGURES.values():
        bounds = (figure.gate.default, figure.gate.onnxruntime) if figure.gate else ()
        gates = ["none" if bound is None else f"{bound:g}" for bound in bounds] or ["", ""]
        meaning = figure.meaning.replace("|", "\\|")
        cells = [f"`{figure.name}`", figure.unit, figure.better or "", figure.source, meaning, *gates]
        text += f"| {' | '.join(cells)} |\n"
    return text


if __name__ == "__main__":
    print(markdown(), end="")
