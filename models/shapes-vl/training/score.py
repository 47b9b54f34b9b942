"""Measure exact match of shapes-vl on held-out images in float32, and with all images replaced by grey.

    python models/shapes-vl/training/score.py models/shapes-vl --images 500

An answer counts if every token, with the stop token, is the model's first choice after the tokens before it: greedy
decoding then gives exactly this answer.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

import world
from train import IGNORED, Batch, Teacher, answer_logits

# Differs from the training's seed: these images and questions are held out.
SEED = 987_654


def questions(rng: random.Random) -> list[tuple[world.Scene | None, world.Question]]:
    """Return a question of each category and language about one new image."""
    scene = world.draw_scene(rng)
    chosen = []
    for category in [*world.IMAGE_CATEGORIES, *world.TEXT_CATEGORIES]:
        about = scene if category in world.IMAGE_CATEGORIES else None
        for language in ("en", "zh"):
            question = world.ask(about, category, language, rng)
            if question:
                chosen.append((about, question))
    return chosen


@torch.inference_mode()
def score(model, tokenizer, processor, images: int, blind: bool) -> dict[tuple[str, str], list[bool]]:
    """Return whether each answer is right, by (category, language)."""
    rng = random.Random(SEED)
    teacher = Teacher(tokenizer, processor, 0)
    outcomes = defaultdict(list)
    for _ in range(images):
        chosen = questions(rng)
        scene = chosen[0][0]
        image = world.paint(scene, rng)
        if blind:
            image.paste((128, 128, 128), (0, 0, *image.size))
        inputs = processor(images=[image], return_tensors="pt")
        merged = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        for about, question in chosen:
            ids, labels = teacher.question(question, scene.size if about else None)
            ids, labels = torch.tensor([ids]), torch.tensor([labels])
            kinds = (ids == teacher.image_id).int()
            grid = inputs["image_grid_thw"]
            batch = Batch(inputs["pixel_values"], grid, torch.empty(0), ids, kinds, labels)
            targets = labels[:, 1:][labels[:, 1:] != IGNORED]
            right = bool((answer_logits(model, batch, merged).argmax(-1) == targets).all())
            outcomes[question.category, question.language].append(right)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=500)
    args = parser.parse_args()
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tools = AutoTokenizer.from_pretrained(args.checkpoint), AutoImageProcessor.from_pretrained(args.checkpoint)
    sighted = score(model, *tools, args.images, blind=False)
    blind = score(model, *tools, args.images, blind=True)
    print("| questions | English | Chinese | blind |")
    print("|---|---|---|---|")
    for category in [*world.IMAGE_CATEGORIES, *world.TEXT_CATEGORIES]:
        shares = [100 * np.mean(sighted[category, language]) for language in ("en", "zh")]
        shares.append(100 * np.mean(blind[category, "en"] + blind[category, "zh"]))
        print(f"| {category} | " + " | ".join(f"{share:.1f} %" for share in shares) + " |")
    for name, chosen in (("with a picture", world.IMAGE_CATEGORIES), ("all", list(world.ASK))):
        means = [100 * np.mean([r for (c, _), rs in o.items() if c in chosen for r in rs]) for o in (sighted, blind)]
        count = sum(len(rs) for (c, _), rs in sighted.items() if c in chosen)
        print(f"{name}: {means[0]:.2f} % of {count} exact, blind {means[1]:.2f} %")


if __name__ == "__main__":
    main()
