"""Exact match of shapes-vl on held-out pictures, in float32, beside a blind model's (the picture replaced by grey).

    python models/shapes-vl/training/score.py models/shapes-vl --pictures 500

An answer counts where every token, the end included, is the model's first choice given those before it: that is when
greedy decoding writes exactly this answer.
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

# Far from the training's seed; its pictures and questions were never trained on.
SEED = 987_654


def questions(rng: random.Random) -> list[tuple[world.Scene | None, world.Question]]:
    """One of each category and language about one new picture."""
    scene = world.draw_scene(rng)
    asked = []
    for category in [*world.PICTURE_CATEGORIES, *world.TEXT_CATEGORIES]:
        about = scene if category in world.PICTURE_CATEGORIES else None
        for language in ("en", "zh"):
            question = world.ask(about, category, language, rng)
            if question:
                asked.append((about, question))
    return asked


@torch.inference_mode()
def score(model, tokenizer, processor, pictures: int, blind: bool) -> dict[tuple[str, str], list[bool]]:
    """Outcome of every question, by (category, language)."""
    rng = random.Random(SEED)
    teacher = Teacher(tokenizer, processor, 0)
    outcomes = defaultdict(list)
    for _ in range(pictures):
        asked = questions(rng)
        scene = asked[0][0]
        image = world.paint(scene, rng)
        if blind:
            image.paste((128, 128, 128), (0, 0, *image.size))
        seen = processor(images=[image], return_tensors="pt")
        merged = model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        for about, question in asked:
            ids, labels = teacher.question(question, scene.size if about else None)
            ids, labels = torch.tensor([ids]), torch.tensor([labels])
            kinds = (ids == teacher.image_id).int()
            grid = seen["image_grid_thw"]
            batch = Batch(seen["pixel_values"], grid, torch.empty(0), ids, kinds, labels)
            wanted = labels[:, 1:][labels[:, 1:] != IGNORED]
            right = bool((answer_logits(model, batch, merged).argmax(-1) == wanted).all())
            outcomes[question.category, question.language].append(right)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--pictures", type=int, default=500)
    args = parser.parse_args()
    model = Qwen2VLForConditionalGeneration.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    tools = AutoTokenizer.from_pretrained(args.checkpoint), AutoImageProcessor.from_pretrained(args.checkpoint)
    sighted = score(model, *tools, args.pictures, blind=False)
    blind = score(model, *tools, args.pictures, blind=True)
    print("| questions | English | Chinese | blind |")
    print("|---|---|---|---|")
    for category in [*world.PICTURE_CATEGORIES, *world.TEXT_CATEGORIES]:
        shares = [100 * np.mean(sighted[category, language]) for language in ("en", "zh")]
        shares.append(100 * np.mean(blind[category, "en"] + blind[category, "zh"]))
        print(f"| {category} | " + " | ".join(f"{share:.1f} %" for share in shares) + " |")
    for name, chosen in (("with a picture", world.PICTURE_CATEGORIES), ("all", list(world.ASK))):
        means = [100 * np.mean([r for (c, _), rs in o.items() if c in chosen for r in rs]) for o in (sighted, blind)]
        count = sum(len(rs) for (c, _), rs in sighted.items() if c in chosen)
        print(f"{name}: {means[0]:.2f} % of {count} exact, blind {means[1]:.2f} %")


if __name__ == "__main__":
    main()
