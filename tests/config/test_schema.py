"""config.yaml: valid keys and values, defaults, and the messages for invalid ones.

A run takes hours on a real model, so invalid settings are refused before the first job, with the path of the key. A
message is one line, because Snakemake and the shell print it between other lines.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hf2mnn.config.budget import Budget, parse_budget
from hf2mnn.config.load import load_config, parse_config, parse_option
from hf2mnn.config.models import LabelledSet
from hf2mnn.config.plan import load_plan
from hf2mnn.config.schema import Config
from hf2mnn.config.variants import Engine, Method, Weights
from hf2mnn.core.errors import ConfigError
from hf2mnn.reference.labelled_sets import DATASETS
from support import REPOSITORY, SHAPES_VL

CAUSES = {"cache_parity": 0.05, "tokenizer_match": 1.0, "template_match": 1.0, "findings": 0, "nc4hw4_decoder": 1}
"""Default gates that do not depend on the bits."""
BITS = [2, 3, 4, 5, 6, 7, 8, 16, 32]


def content(**variant: Any) -> dict[str, Any]:
    """Return the smallest config: a missing model and one variant."""
    return {"models": {"m": {"source": {"path": "nowhere"}}}, "variants": {"v": {"bits": 4, **variant}}}


def put(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `tree` with `value` at a path of keys; missing mappings are created."""
    tree = copy.deepcopy(tree)
    *parents, last = path.split("/")
    mapping = tree
    for key in parents:
        mapping = mapping.setdefault(key, {})
    mapping[last] = value
    return tree


def test_revisions_and_toolchains_become_instances() -> None:
    """Each version has its own folder of results, and the name of the version to compare with."""
    tree = content()
    tree["toolchains"] = {"old": {"pins": {"MNN": "3.6.0"}}, "new": {"others": "newest"}}
    tree["models"] = {
        "plain": {"source": {"path": "a"}, "toolchains": ["old"]},
        "hub": {
            "source": {"repository": "owner/name"},
            "revisions": {"v1": {"revision": "1"}, "v2": {"revision": "2"}},
            "toolchains": [],
            "max_new_tokens": 7,
        },
        "local": {"revisions": {"v1": {"path": "b"}, "v2": {"path": "c"}}},
    }
    instances = parse_config(tree).models
    before = {
        "plain": None,
        "plain+old": "plain",
        "hub@v1": None,
        "hub@v2": "hub@v1",
        "local@v1": None,
        "local@v1+old": "local@v1",
        "local@v1+new": "local@v1",
        "local@v2": "local@v1",
        "local@v2+old": "local@v2",
        "local@v2+new": "local@v2",
    }
    assert {name: instance.before for name, instance in instances.items()} == before
    assert [instance.toolchain or "" for instance in instances.values()] == [name.partition("+")[2] for name in before]
    sources = {name: instance.source.model_dump(exclude_unset=True) for name, instance in instances.items()}
    assert sources["plain+old"] == sources["plain"] == {"path": "a"}
    assert sources["hub@v2"] == {"repository": "owner/name", "revision": "2"}
    assert sources["local@v2+new"] == {"path": "c"}
    assert instances["hub@v2"].max_new_tokens == 7


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "models.m.source: this key is missing"),
        ({"revisions": {}}, "models.m.revisions: "),
        ({"revisions": {"v": {}}}, "models.m.revisions.v: give exactly one of path"),
        (
            {"source": {"path": "a"}, "revisions": {"v": {"revision": "1"}}},
            "models.m.revisions.v: revision is only for",
        ),
        ({"source": {"path": "a"}, "revisions": {"v+": {}}}, "models.m.revisions.v+: 'v+' is not a valid name"),
        (
            {"source": {"path": "a"}, "toolchains": ["x"]},
            "models.m.toolchains: there is no toolchain x; there are none",
        ),
    ],
)
def test_invalid_revisions_are_refused(model: dict, message: str) -> None:
    assert f"config: {message}" in refusal(content() | {"models": {"m": model}})


@pytest.mark.parametrize("release", [3.5, ">=3.5", "3.5 --pre", ""])
def test_a_toolchain_names_one_release_of_a_package(release: object) -> None:
    """Pip gets it as NAME==RELEASE."""
    assert "toolchains.t.pins.MNN: " in refusal(content() | {"toolchains": {"t": {"pins": {"MNN": release}}}})


def refusal(tree: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(tree)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("config: ")
    return message


@pytest.mark.parametrize(
    "path",
    [
        "model",
        "models/m/sauce",
        "models/m/source/branch",
        "models/m/evaluation/split",
        "variants/v/bit",
        "variants/v/vision/blok",
        "variants/v/engine/backend",
        "variants/v/gates/task_accuracy",
        "gates/kld",
        "onnxruntime/bits",
        "onnxruntime/gates/top5",
        "benchmark/repeat",
    ],
)
def test_unknown_key_is_refused_in_every_block(path: str) -> None:
    """An ignored misspelled gate would never be checked."""
    tree = content()
    if "evaluation/" in path:
        tree = put(tree, "models/m/evaluation/dataset", "ai2d")
    if "vision/" in path:
        tree = put(tree, "variants/v/vision/bits", 8)
    assert refusal(put(tree, path, 1)).startswith(f"config: {path.replace('/', '.')}: ")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model", 1, "config: model: there is no such key; did you mean 'models'?"),
        ("models/m/max_new_token", 1, "there is no such key; did you mean 'max_new_tokens'?"),
        ("models/m/evaluation", {"datset": "ai2d"}, "models.m.evaluation.datset: there is no such key; did you mean"),
        ("variants/v/bit", 4, "variants.v.bit: there is no such key; did you mean 'bits'?"),
        ("variants/v/vision", {"bits": 8, "blok": 64}, "variants.v.vision.blok: there is no such key; did you mean"),
        ("variants/v/engine/thread", 1, "there is no such key; did you mean 'threads'?"),
        ("variants/v/gates/top1_agrement", 1, "there is no such key; did you mean 'top1_agreement'?"),
        ("gates/kld", 1, "gates.kld: there is no such key; did you mean 'mean_kld'?"),
        ("variants/v/engine/xyz", 1, "there is no such key; valid are precision, memory, threads"),
        ("variants/v/method", "gpqt", "did you mean 'gptq'?"),
        ("models/m/evaluation", {"dataset": "docqva"}, "did you mean 'docvqa'?"),
        ("models/m/variants", ["vv"], "there is no variant vv; did you mean 'v'?"),
        ("speed", {"repeats": 1}, "config: speed: there is no such key; it is called 'benchmark' now"),
        ("benchmark/picture_side", 224, "benchmark.picture_side: there is no such key; it is called 'image_side' now"),
        (
            "variants/v/method",
            "lsq",
            "'lsq' is not one of 'rtn', 'hqq', 'mse', 'awq', 'gptq' or 'checkpoint'; it is called",
        ),
    ],
)
def test_unknown_name_gets_the_nearest_or_the_present_one(path: str, value: Any, message: str) -> None:
    assert message in refusal(put(content(), path, value))


def test_variant_named_like_a_key_does_not_change_the_suggestion() -> None:
    tree = {"models": {"m": {"source": {"path": "x"}}}, "variants": {"vision": {"bits": 4, "gate": {}}}}
    assert "variants.vision.gate: there is no such key; did you mean 'gates'?" in refusal(tree)


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("variants/v/bits", 1, ["variants.v.bits", "1 is not one of 2"]),
        ("variants/v/bits", 9, ["variants.v.bits", "9 is not"]),
        ("variants/v/bits", 16.5, ["variants.v.bits", "16.5 is not"]),
        ("variants/v/bits", "four", ["variants.v.bits", "'four' is not"]),
        ("variants/v/bits", True, ["variants.v.bits", "True is not"]),
        ("variants/v/bits", None, ["variants.v.bits"]),
        ("variants/v/block", 24, ["variants.v.block", "24 is not a multiple of 16"]),
        ("variants/v/block", -16, ["variants.v.block", "-16"]),
        ("variants/v/vision", {"block": 64}, ["variants.v.vision.bits", "missing"]),
        ("variants/v/method", "spqr", ["variants.v.method", "'spqr' is not one of 'rtn', 'hqq', 'mse'"]),
        ("variants/v", {"bits": 4, "method": "hqq", "symmetric": True}, ["variants.v", "no", "zero point", "mse"]),
        ("variants/v", {"bits": "auto"}, ["variants.v", "budget"]),
        ("variants/v", {"bits": 4, "budget": 4.25}, ["variants.v", "bits: auto"]),
        ("variants/v", {"bits": "auto", "budget": 900}, ["variants.v", "900", "850MB"]),
        ("variants/v", {"bits": "auto", "budget": "large"}, ["variants.v", "'large' is not a budget"]),
        ("variants/v", {"bits": "auto", "budget": 4, "block": 64}, ["variants.v", "remove block"]),
        ("variants/v", {"bits": "auto", "budget": 4, "method": "checkpoint"}, ["variants.v", "mse, awq or gptq"]),
        ("variants/v/embedding", "disk", ["variants.v.embedding", "'file' or 'lm_head'"]),
        ("models/m/calibration", {"dataset": "ai2d"}, ["models.m.calibration"]),
        ("calibration/bits", [9], ["calibration.bits", "9"]),
        ("calibration/rows", 0, ["calibration.rows", "0"]),
        ("variants/v/symmetric", "perhaps", ["variants.v.symmetric", "'perhaps'"]),
        ("variants/v/engine/precision", "int8", ["variants.v.engine.precision", "'int8'"]),
        ("variants/v/engine/threads", 0, ["variants.v.engine.threads", "0"]),
        ("variants/v/gates/top1_agreement", 95, ["variants.v.gates.top1_agreement", "95"]),
        ("variants/v/gates/mean_kld", float("nan"), ["variants.v.gates.mean_kld", "nan"]),
        ("gates/answers_lost", 0.5, ["gates.answers_lost", "0.5"]),
        ("gates/findings", 0.5, ["gates.findings", "0.5"]),
        ("gates/findings", -1, ["gates.findings", "-1"]),
        ("gates/cache_parity", -0.1, ["gates.cache_parity", "-0.1"]),
        ("gates/tokenizer_match", 1.1, ["gates.tokenizer_match", "1.1"]),
        ("benchmark/repeats", 0, ["benchmark.repeats", "0"]),
        ("benchmark/threads", 0, ["benchmark.threads", "0"]),
        ("variants/v w", {"bits": 4}, ["variants.v w", "is not a valid name"]),
        ("variants/../v", {"bits": 4}, ["config: variants...", "v"]),
        ("variants/.hidden", {"bits": 4}, ["'.hidden' is not a valid name"]),
        ("variants/pytorch", {"bits": 4}, ["variants.pytorch", "reserved"]),
        ("variants/onnxruntime", {"bits": 4}, ["variants.onnxruntime", "reserved"]),
        ("variants/float", {"bits": 32}, ["variants.float", "reserved"]),
        ("variants", {}, ["variants", "at least 1"]),
        ("variants", ["int4"], ["variants", "dictionary"]),
        ("models", {}, ["models", "at least 1"]),
        ("models/a|b", {"source": {"path": "x"}}, ["models.a|b", "is not a valid name"]),
        ("models/-rf", {"source": {"path": "x"}}, ["models.-rf", "is not a valid name"]),
        ("models/m", {}, ["models.m.source", "missing"]),
        ("models/m/source", {}, ["models.m.source", "exactly one of path", "repository"]),
        (
            "models/m/source",
            {"path": "a", "repository": "b/c"},
            ["models.m.source", "exactly one of path", "repository"],
        ),
        ("models/m/source", {"path": "a", "pin": "p.json"}, ["models.m.source", "exactly one of path", "pin"]),
        (
            "models/m/source",
            {"pin": "p.json", "repository": "b/c"},
            ["models.m.source", "exactly one of path", "and pin"],
        ),
        (
            "models/m/source",
            {"path": "a", "revision": "main"},
            ["models.m.source", "revision is only for a repository"],
        ),
        ("models/m/source", {"path": "a", "files": "b"}, ["models.m.source", "files is only for a repository or pin"]),
        (
            "models/m/source",
            {"pin": "p.json", "hub": "modelscope"},
            ["models.m.source", "hub is only for a repository"],
        ),
        ("models/m/source", {"repository": "b/c", "hub": "x"}, ["models.m.source.hub", "'modelscope'"]),
        (
            "models/m/source",
            {"path": "a", "adapter": {"revision": "x"}},
            ["models.m.source.adapter.repository", "missing"],
        ),
        ("models/m/source", {"path": "a", "adapter": {"repository": "b/c", "path": "x"}}, ["source.adapter.path"]),
        ("models/m/source", {"adapter": "b"}, ["models.m.source", "exactly one of path", "repository"]),
        ("models/m/variants", ["w"], ["models.m.variants", "no variant w", "valid are v"]),
        ("models/m/evaluation", 3, ["models.m.evaluation: ", "string, not 3"]),
        ("models/m/evaluation", ["a"], ["models.m.evaluation: ", "string"]),
        ("models/m/evaluation", {}, ["models.m.evaluation.dataset", "missing"]),
        ("models/m/evaluation", {"dataset": "gqa"}, ["models.m.evaluation.dataset", "'gqa' is not one of 'textvqa'"]),
        ("models/m/evaluation", {"dataset": "ai2d", "samples": 0}, ["models.m.evaluation.samples", "0"]),
        ("models/m/max_new_tokens", "many", ["models.m.max_new_tokens", "'many'"]),
        ("threads", 0, ["threads", "0"]),
        ("time_limit", [1], ["time_limit"]),
    ],
)
def test_message_has_the_key_and_the_problem(path: str, value: Any, parts: list[str]) -> None:
    message = refusal(put(content(), path, value))
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(("variants", "part"), [([], "at least 1"), (["v", "v"], "twice")], ids=["empty", "twice"])
def test_empty_or_repeated_variants_are_refused(variants: list[str], part: str) -> None:
    """An empty list must not mean all variants, nor a repeated name two rows."""
    message = refusal(put(content(), "models/m/variants", variants))
    assert "models.m.variants" in message and part in message


@pytest.mark.parametrize("tree", [None, [], "text", 3], ids=str)
def test_top_level_must_be_a_mapping(tree: Any) -> None:
    refusal(tree)


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ({"block": 96}, "variants.v.block: 96 does not divide the 256 inputs of a decoder layer of m"),
        ({"block": 512}, "variants.v.block: 512 does not divide the 256 inputs"),
        (
            {"vision": {"bits": 8, "block": 128}},
            "variants.v.vision.block: 128 does not divide the 192 inputs of a vision",
        ),
    ],
)
def test_block_that_the_converter_would_drop_is_refused(variant: dict[str, Any], key: str) -> None:
    """MNN's converter uses one scale per channel without a message if the block does not divide the inputs."""
    tree = put(content(**variant), "models/m/source/path", str(SHAPES_VL))
    assert key in refusal(tree)


def test_block_of_float_weights_is_ignored() -> None:
    parse_config(put(content(bits=16, block=96), "models/m/source/path", str(SHAPES_VL)))


@pytest.mark.parametrize("stored", ["[]", "{", '"text"', '{"text_config": 3}', '{"hidden_size": "256"}', "\udcff"])
def test_broken_checkpoint_is_left_to_the_fetch_stage(tmp_path: Path, stored: str) -> None:
    """That stage has a message for an invalid config.json; Snakemake must not stop with a traceback."""
    (tmp_path / "config.json").write_bytes(stored.encode("utf-8", "surrogateescape"))
    parse_config(put(content(block=64), "models/m/source/path", str(tmp_path)))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"models: {m: [", "is not valid YAML"),
        (b"models:\n\t- x", "is not valid YAML"),
        (b"- models", "config: "),
        (b"models: {}\nthreads: 1\nmodels: {}", "'models' twice, in lines 1 and 3"),
        (b"models:\n  x: y: z", "not valid YAML: mapping values are not allowed here at line 2, column 7: x: y: z"),
        (b"", "config: "),
        ("models: {ä: 1}".encode("latin-1"), "config.yaml"),
    ],
    ids=["open bracket", "tab", "list", "duplicate", "colon", "empty", "not utf-8"],
)
def test_invalid_file_is_refused(tmp_path: Path, written: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(written)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(path)
    assert "\n" not in str(refused.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: .*nowhere\.yaml cannot be read \(No such file"):
        load_config(tmp_path / "nowhere.yaml")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FULL = put(
    put(content(vision={"bits": 8}, engine={}, gates={}), "onnxruntime/gates/mean_kld", 1.0),
    "models/m/variants",
    ["v"],
)
FULL = put(FULL, "models/m/evaluation", {"dataset": "ai2d", "samples": 3})


@given(data=st.data(), value=ANYTHING)
@settings(max_examples=80, deadline=None)
def test_any_value_anywhere_gives_one_line_or_a_config(data: st.DataObject, value: Any) -> None:
    """Never a traceback, never two lines."""
    tree = copy.deepcopy(FULL)
    mapping: Any = tree
    while isinstance(mapping, dict) and mapping:
        key = data.draw(st.sampled_from(sorted(mapping)) | st.text(max_size=4))
        if key not in mapping or not isinstance(mapping[key], dict) or data.draw(st.integers(0, 3)) == 0:
            break
        mapping = mapping[key]
    if isinstance(mapping, dict):
        mapping[key if mapping else "key"] = value
    try:
        assert isinstance(parse_config(tree), Config)
    except ConfigError as refused:
        assert len(str(refused).splitlines()) == 1


@pytest.mark.parametrize("path", ["variants/v/bits\nblock", "variants/v\nw", "on\u2028e"])
def test_key_with_a_line_break_gives_one_line(path: str) -> None:
    assert len(refusal(put(content(), path, {"bits": 4})).splitlines()) == 1


@given(
    bits=st.sampled_from(BITS),
    block=st.integers(0, 64).map(lambda n: 16 * n),
    symmetric=st.booleans(),
    scale_bits=st.sampled_from([16, 32]),
    method=st.sampled_from(get_args(Method)),
)
@settings(max_examples=40, deadline=None)
@example(bits=4, block=0, symmetric=False, scale_bits=16, method="rtn")
def test_every_weight_format_survives_yaml_and_the_command_line(**described: Any) -> None:
    """Snakemake passes the parsed settings to `hf2mnn quantize` as JSON; no value may change."""
    assume(not (described["method"] == "hqq" and described["symmetric"]))
    config = parse_config(yaml.safe_load(yaml.safe_dump(content(**described))))
    weights = config.decoder_weights("v").model_dump(include=set(Weights.model_fields))
    assert weights == described
    assert parse_option(Weights, Weights(**weights).model_dump_json(), "--decoder") == described


@pytest.mark.parametrize(
    ("bits", "vision", "setting"), [(32, 32, "high"), (16, 16, "high"), (8, 8, "low"), (4, 8, "low")]
)
def test_defaults_follow_from_the_bits(bits: int, vision: int, setting: str) -> None:
    """Float bundles compute in float32, quantized ones as on a phone with a vision tower of 8 bits per channel."""
    config = parse_config(content(bits=bits, **({"block": 64} if bits < 16 else {})))
    assert config.vision_weights("v") == Weights(bits=vision, block=0)
    assert config.engine("v") == Engine(precision=setting, memory=setting, threads=4)


def test_own_settings_override_defaults() -> None:
    config = parse_config(content(vision={"bits": 4, "block": 32}, engine={"precision": "normal", "threads": 2}))
    assert config.vision_weights("v") == Weights(bits=4, block=32)
    assert config.engine("v") == Engine(precision="normal", memory="low", threads=2)


def test_gates_of_a_variant_override_the_general_ones_one_by_one() -> None:
    """ONNX Runtime has its own strict bounds, which those for 4 bits do not change."""
    general = {"mean_kld": 0.1, "vision_cosine": 0.9, "accuracy_lost": None}
    config = parse_config(put(content(gates={"mean_kld": 0.5, "answers_lost": 0}), "gates", general))
    expected = {"mean_kld": 0.5, "answers_lost": 0, "vision_cosine": 0.9, "top1_agreement": 0.95}
    assert config.gates_of("v") == expected | CAUSES
    assert config.gates_of("onnxruntime")["mean_kld"] == 1e-6
    assert (config.required("v"), config.required("onnxruntime")) == (False, True)


def test_gates_have_defaults() -> None:
    """Without them a bundle with no right answer would pass."""
    gates = parse_config(content()).gates_of("v")
    figures = {"top1_agreement": 0.95, "mean_kld": 0.1, "accuracy_lost": 0.05, "vision_cosine": 0.99}
    assert gates == figures | CAUSES


@pytest.mark.parametrize("gate", CAUSES)
def test_default_gates_can_be_changed_and_removed(gate: str) -> None:
    """A known and accepted fault must not stop every run."""
    assert parse_config(put(content(gates={gate: 1}), f"gates/{gate}", None)).gates_of("v")[gate] == 1
    assert gate not in parse_config(put(content(), f"gates/{gate}", None)).gates_of("v")
    assert gate not in parse_config(content(gates={gate: None})).gates_of("v")


def test_variants_of_a_model_are_all_or_the_listed_ones() -> None:
    tree = put(content(), "variants/w", {"bits": 8})
    assert parse_config(tree).variants_of("m") == ["v", "w"]
    assert parse_config(put(tree, "models/m/variants", ["w"])).variants_of("m") == ["w"]


def test_evaluation_is_a_folder_or_a_data_set() -> None:
    assert parse_config(content()).models["m"].evaluation == "evaluation/general"
    assert parse_config(put(content(), "models/m/evaluation", "mine")).models["m"].evaluation == "mine"
    block = {"dataset": "docvqa", "samples": 20}
    chosen = parse_config(put(content(), "models/m/evaluation", block)).models["m"].evaluation
    assert chosen == LabelledSet(dataset="docvqa", samples=20, path=None, revision="main", seed=0)


def test_every_loader_can_be_named_in_the_config() -> None:
    """The names are in both modules, because the configuration is read without the datasets library."""
    assert set(get_args(LabelledSet.model_fields["dataset"].annotation)) == set(DATASETS)


def test_committed_config_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the root of the repository, where the checkpoint exists, so that blocks are checked too."""
    monkeypatch.chdir(REPOSITORY)
    config = load_config(REPOSITORY / "config.yaml")
    for model in config.models.values():
        assert Path(model.source.path or "", "config.json").is_file() == (model.source.path is not None)
        if isinstance(model.evaluation, str):
            assert Path(model.evaluation, "examples.jsonl").is_file()
    assert any(config.required(variant) for variant in config.variants)


def test_schema_file_is_the_schema() -> None:
    """Editors check config.yaml with this file. `make schema` writes it."""
    written = (REPOSITORY / "workflow/schemas/config.schema.yaml").read_text()
    assert yaml.safe_load(written) == Config.model_json_schema()


def test_every_key_is_described() -> None:
    schema = Config.model_json_schema()
    for name, block in {"config": schema, **schema["$defs"]}.items():
        assert block.get("additionalProperties") is False, name
        assert [key for key, described in block["properties"].items() if not described.get("description")] == [], name


# Plans and budgets


def test_mixed_precision_takes_its_bits_from_the_plan() -> None:
    """The bits on the command line are a default that the plan overrides for every operator."""
    config = parse_config(content(bits="auto", budget=4.25, method="gptq"))
    assert config.decoder_weights("v") == config.vision_weights("v") == Weights(bits=8, method="gptq")
    assert config.engine("v").memory == "low"
    assert config.calibrated("v")


def test_methods_include_those_of_the_plan(tmp_path: Path) -> None:
    """An operator with gptq needs recorded activations, whatever the method of the variant is."""
    path = tmp_path / "plan.yaml"
    path.write_text("decoder:\n  lm_head: {bits: 6, method: gptq}\n  a.b: {block: 32}\n")
    config = parse_config(content(block=64, plan=str(path)))
    assert config.methods("v") == {"mse", "gptq"}
    assert config.calibrated("v")
    plan = load_plan(path).model_dump(exclude_none=True)
    assert plan == {"decoder": {"lm_head": {"bits": 6, "method": "gptq"}, "a.b": {"block": 32}}, "vision": {}}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "cannot be read"),
        ("decoder: [", "is not valid YAML"),
        ("decoders: {}", "there is no such key; did you mean 'decoder'?"),
        ("decoder: {lm_head: {bits: 9}}", "decoder.lm_head.bits: 9"),
        ("vision: {a: {block: 20}}", "multiple of 16"),
    ],
)
def test_invalid_plan_is_refused_with_file_and_key(text: str | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_plan(path)
    assert str(path) in str(refused.value)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.floats(1.5, 16).map(lambda bits: round(bits, 3)))
def test_number_is_bits_per_weight(bits: float) -> None:
    assert parse_budget(bits) == parse_budget(str(bits)) == Budget(bits_per_weight=bits)


@pytest.mark.parametrize(
    ("text", "size"), [("850MB", 850_000_000), ("1.5 GB", 1_500_000_000), ("2 MiB", 2_097_152), ("700000B", 700_000)]
)
def test_number_with_a_unit_is_the_size_of_the_bundle(text: str, size: int) -> None:
    assert parse_budget(text) == Budget(bundle_bytes=size)


def test_paths_of_a_home_directory_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a path may be; one of an unknown user stays, and Snakemake says that it is missing."""
    monkeypatch.setenv("HOME", "/people/me")
    config = parse_config(
        {
            "models": {
                "a": {"source": {"path": "~/a", "adapter": "~/lora"}, "evaluation": "~/set", "calibration": "~/other"},
                "b": {"source": {"pin": "~/pin.json", "files": "~/files"}, "evaluation": "~nobody-here/set"},
                "c": {"source": {"repository": "~/c"}, "evaluation": {"dataset": "docvqa", "path": "~/docvqa"}},
            },
            "variants": {"int4": {"bits": 4, "plan": "~/plan.yaml"}},
        }
    )
    a, b, c = (config.models[name] for name in "abc")
    assert (a.source.path, a.source.adapter) == ("/people/me/a", "/people/me/lora")
    assert (a.evaluation, a.calibration) == ("/people/me/set", "/people/me/other")
    assert (b.source.pin, b.source.files) == ("/people/me/pin.json", "/people/me/files")
    assert (b.evaluation, c.evaluation.path) == ("~nobody-here/set", "/people/me/docvqa")
    assert c.source.repository == "~/c", "no path"
    assert config.variants["int4"].plan == "/people/me/plan.yaml"


def test_duplicate_keys_in_an_option_are_refused() -> None:
    with pytest.raises(ConfigError, match="--decoder: it has the key 'bits' twice, in line 1: remove one"):
        parse_option(Weights, '{"bits": 4, "bits": 8}', "--decoder")
