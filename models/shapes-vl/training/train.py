"""Train shapes-vl from scratch and save it as a checkpoint of transformers.

    python models/shapes-vl/training/train.py --out models/shapes-vl

Two methods let so small a model learn image understanding on a CPU within an hour (measurements are in the model card).
Weights are initialized by fan-in. During training, three linear heads on the vision tower's output predict the cell of
each merged patch, and the colour and kind of the thing in that cell. The heads are not saved.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import world
from tokenizer import train_tokenizer

VOCABULARY = 640
HIDDEN = 256
SYSTEM = "You are a helpful assistant."
IGNORED = -100


def build_config(tokenizer) -> Qwen2VLConfig:
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={"depth": 2, "embed_dim": 192, "num_heads": 4, "mlp_ratio": 4, "hidden_size": HIDDEN},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def initialize(model: nn.Module) -> None:
    """Initialize matrices by fan-in: with transformers' fixed 0.02, a model this narrow ignores images."""
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            nn.init.normal_(parameter, std=0.05)
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.7 / math.sqrt(parameter[0].numel()))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Probes(nn.Module):
    """Linear heads on merged patches [n, hidden]: cell, kind and colour of the cell's thing (last class: nothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(HIDDEN, len(world.PLACES))
        self.kind = nn.Linear(HIDDEN, len(world.KINDS) + 1)
        self.colour = nn.Linear(HIDDEN, len(world.COLOURS) + 1)

    def loss(self, merged: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        heads = (self.cell, self.kind, self.colour)
        return sum(F.cross_entropy(h(merged), targets[:, i], ignore_index=IGNORED) for i, h in enumerate(heads))

    @torch.no_grad()
    def accuracy(self, merged: torch.Tensor, targets: torch.Tensor) -> list[float]:
        kept = targets[:, 0] != IGNORED
        heads = (self.cell, self.kind, self.colour)
        return [(h(merged).argmax(-1) == targets[:, i])[kept].float().mean().item() for i, h in enumerate(heads)]


def probe_targets(scene: world.Scene) -> list[list[int]]:
    """Return targets [merged patches, 3]; patches across two cells are ignored."""
    columns, rows = scene.size[0] // 28, scene.size[1] // 28
    targets = []
    for row in range(rows):
        for column in range(columns):
            if 2 * row + 1 == rows or 2 * column + 1 == columns:
                targets.append([IGNORED] * 3)
                continue
            cell = 2 * (2 * row + 1 > rows) + (2 * column + 1 > columns)
            thing = scene.cells[cell]
            kind = world.KINDS.index(thing.kind) if thing else len(world.KINDS)
            colour = list(world.COLOURS).index(thing.colour) if thing else len(world.COLOURS)
            targets.append([cell, kind, colour])
    return targets


@dataclass
class Batch:
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    probe_targets: torch.Tensor
    input_ids: torch.Tensor
    token_types: torch.Tensor
    labels: torch.Tensor


class Teacher:
    """Builder of batches of one image size; several questions about an image are turns of a conversation."""

    def __init__(self, tokenizer, processor: Qwen2VLImageProcessorPil, seed: int) -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self.rng = random.Random(seed)
        self.image_id, self.pad_id = tokenizer.convert_tokens_to_ids("<|image_pad|>"), tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text).input_ids
        return self._ids[text]

    def turn(self, question: world.Question, image: list[int]) -> tuple[list[int], list[int]]:
        """Return ids and labels of a question and its answer; `image` are the ids of the image before them."""
        prompt = self.encode("<|im_start|>user\n") + image + self.encode(question.text)
        prompt = prompt + self.encode("<|im_end|>\n<|im_start|>assistant\n")
        answer, newline = self.encode(question.answer + "<|im_end|>"), self.encode("\n")
        labels = [IGNORED] * len(prompt) + answer + [IGNORED] * len(newline)
        return prompt + answer + newline, labels

    def question(self, question: world.Question, size: tuple[int, int] | None) -> tuple[list[int], list[int]]:
        """Return ids and labels of a conversation of one question, with an image of `size` or without one."""
        ids = self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n")
        more, labels = self.turn(question, self.image(size))
        return ids + more, [IGNORED] * len(ids) + labels

    def image(self, size: tuple[int, int] | None) -> list[int]:
        if size is None:
            return []
        pads = [self.image_id] * (size[0] * size[1] // 28**2)
        return self.encode("<|vision_start|>") + pads + self.encode("<|vision_end|>")

    def conversation(self, scene: world.Scene | None, turns: int) -> tuple[list[int], list[int]]:
        """Return ids and labels in the format of the chat template; only answers and their <|im_end|> have labels."""
        ids = self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n").copy()
        labels = [IGNORED] * len(ids)
        categories = world.TEXT_CATEGORIES if scene is None else world.IMAGE_CATEGORIES
        for turn in range(turns):
            question = None
            while question is None:
                question = world.ask(scene, self.rng.choice(categories), self.rng.choice(["en", "zh"]), self.rng)
            more, targets = self.turn(question, self.image(scene.size if scene and turn == 0 else None))
            ids += more
            labels += targets
        return ids, labels

    def batch(self, size: int, turns: int, text_share: float) -> Batch:
        shape = self.rng.choice(world.SIZES)
        scenes, rows = [], []
        for _ in range(size):
            if self.rng.random() < text_share:
                rows.append(self.conversation(None, 2 * turns))
                continue
            scene = world.draw_scene(self.rng, shape)
            scenes.append(scene)
            rows.append(self.conversation(scene, turns))
        images = self.processor(images=[world.paint(s, self.rng) for s in scenes], return_tensors="pt")
        length = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((size, length), self.pad_id)
        labels = torch.full((size, length), IGNORED)
        for row, (ids, targets) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, : len(ids)] = torch.tensor(targets)
        return Batch(
            images["pixel_values"],
            images["image_grid_thw"],
            torch.tensor([target for scene in scenes for target in probe_targets(scene)]),
            input_ids,
            (input_ids == self.image_id).int(),
            labels,
        )


def answer_logits(model: Qwen2VLForConditionalGeneration, batch: Batch, merged: torch.Tensor) -> torch.Tensor:
    """Return logits [answer tokens, vocabulary], each from the position before its token."""
    core = model.model
    embeds = core.language_model.embed_tokens(batch.input_ids)
    embeds = embeds.masked_scatter(batch.token_types.bool()[..., None], merged)
    positions, _ = core.get_rope_index(batch.input_ids, batch.token_types, image_grid_thw=batch.grid_thw)
    hidden = core.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != IGNORED])


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def optimizer_of(*modules: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    decayed = [parameter for parameter in parameters if parameter.ndim >= 2]
    plain = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def run(
    steps: int, peak: float, warmup: int, modules: list[nn.Module], teacher, make_batch, losses, state: Path
) -> None:
    """Train; `losses(batch)` returns the loss and figures to print, which are averaged between lines.

    The state is saved every 250 steps to `state`, so that an interrupted training resumes with the same result.
    """
    optimizer = optimizer_of(*modules)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=False)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        for module, weights in zip(modules, kept["modules"], strict=True):
            module.load_state_dict(weights)
        teacher.rng.setstate(kept["rng"])
        print(f"resumed at step {first}", flush=True)
    started, figures = time.monotonic(), []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup)
        loss, values = losses(make_batch())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        figures.append(values)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            kept = {"step": step + 1, "optimizer": optimizer.state_dict(), "rng": teacher.rng.getstate()}
            kept["modules"] = [module.state_dict() for module in modules]
            torch.save(kept, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
        if (step + 1) % 50 == 0 or step + 1 == steps:
            means = {key: round(float(np.mean([f[key] for f in figures])), 4) for key in figures[0]}
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1 - first) * (steps - step - 1)
            print(f"step {step + 1}/{steps}  {elapsed:.0f} s, {left:.0f} s left  {means}", flush=True)
            figures = []


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed, VOCABULARY)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256})
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    model.train()
    initialize(model)
    probes = Probes()
    visual = model.model.visual
    teacher = Teacher(tokenizer, processor, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)

    def see(batch: Batch) -> tuple[torch.Tensor, dict]:
        merged = visual(batch.pixel_values, grid_thw=batch.grid_thw).pooler_output
        loss = probes.loss(merged, batch.probe_targets)
        cell, kind, colour = probes.accuracy(merged, batch.probe_targets)
        return loss, {"loss": loss.item(), "cell": cell, "kind": kind, "colour": colour}

    def answer(batch: Batch) -> tuple[torch.Tensor, dict]:
        merged = visual(batch.pixel_values, grid_thw=batch.grid_thw).pooler_output
        probe = probes.loss(merged, batch.probe_targets)
        logits = answer_logits(model, batch, merged)
        wanted = batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED]
        loss = F.cross_entropy(logits, wanted)
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return loss + 0.3 * probe, {"loss": loss.item(), "token accuracy": right, "probe": probe.item()}

    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    print("vision tower", flush=True)
    state = work / "vision.pt"
    run(args.vision_steps, 1.5e-3, 100, [visual, probes], teacher, lambda: teacher.batch(32, 1, 0.0), see, state)
    print("whole model", flush=True)
    state = work / "model.pt"
    run(
        args.steps,
        args.peak,
        200,
        [model, probes],
        teacher,
        lambda: teacher.batch(args.batch, args.turns, 0.06),
        answer,
        state,
    )
    save(model, tokenizer, processor, args)


def save(model, tokenizer, processor, args: argparse.Namespace) -> None:
    """Save bfloat16 safetensors with tokenizer, chat template and processor settings, in the layout of Qwen2-VL."""
    out = Path(args.out)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)
    described = json.loads((out / "preprocessor_config.json").read_text())
    described["image_processor_type"] = "Qwen2VLImageProcessor"
    (out / "preprocessor_config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the checkpoint")
    parser.add_argument("--work", default="training-state", help="folder for the state to resume from")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--vision-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--peak", type=float, default=8e-4, help="highest learning rate")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
