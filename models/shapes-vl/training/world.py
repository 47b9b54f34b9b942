"""Synthetic data of shapes-vl: drawn images, and questions with one right answer each.

An image holds zero to four things on a 2 x 2 grid. A thing is a shape or a digit, in one of six colours. All functions
are pure functions of a `random.Random`, so a seed defines a data set.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": ("红色", (214, 40, 40)),
    "green": ("绿色", (30, 150, 60)),
    "blue": ("蓝色", (40, 80, 220)),
    "yellow": ("黄色", (240, 200, 20)),
    "purple": ("紫色", (150, 50, 180)),
    "black": ("黑色", (20, 20, 20)),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形"}
DIGITS = [str(digit) for digit in range(10)]
PLACES = {"top left": "左上角", "top right": "右上角", "bottom left": "左下角", "bottom right": "右下角"}
KINDS = [*SHAPES, *DIGITS]

# All sides are multiples of 28 (patch 14, merged 2 x 2), so the processor does not resize. Two are not square, because
# engines have had wrong positions after tall and wide images.
SIZES = [(112, 112), (112, 168), (168, 112), (140, 140)]

# Categories of questions with and without an image.
IMAGE_CATEGORIES = ["object", "colour", "count", "exists", "place", "digit", "describe"]
TEXT_CATEGORIES = ["sum", "translate"]


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str

    def name(self, language: str) -> str:
        if language == "en":
            return f"{self.colour} {self.kind}"
        noun = f"数字{self.kind}" if self.kind in DIGITS else SHAPES[self.kind]
        return COLOURS[self.colour][0] + noun


@dataclass(frozen=True)
class Scene:
    """Things, or None, by position in the order of PLACES; `size` is (width, height) in pixels."""

    cells: tuple[Thing | None, ...]
    size: tuple[int, int]

    def at(self) -> dict[str, Thing | None]:
        return dict(zip(PLACES, self.cells, strict=True))

    def things(self) -> list[Thing]:
        return [thing for thing in self.cells if thing]


@dataclass(frozen=True)
class Question:
    category: str
    language: str
    text: str
    answer: str


def draw_scene(rng: random.Random, size: tuple[int, int] | None = None) -> Scene:
    """Draw a random scene; colours and kinds repeat, so that questions need counting and binding."""
    count = rng.choices(range(5), weights=[1, 6, 8, 8, 8])[0]
    colours = rng.sample(list(COLOURS), rng.choice([2, 3, 6]))
    cells: list[Thing | None] = [None] * 4
    for cell in rng.sample(range(4), count):
        kind = rng.choice(DIGITS) if rng.random() < 0.4 else rng.choice(list(SHAPES))
        cells[cell] = Thing(rng.choice(colours), kind)
    return Scene(tuple(cells), size or rng.choice(SIZES))


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def _polygon(kind: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (5, 0.42)}[kind]
    steps = corners if inner == 1.0 else 2 * corners
    points = []
    for step in range(steps):
        length = radius if inner == 1.0 or step % 2 == 0 else radius * inner
        angle = 2 * np.pi * step / steps + tilt + (np.pi / 4 if kind == "square" else -np.pi / 2)
        points.append((x + length * np.cos(angle), y + length * np.sin(angle)))
    return points


@cache
def _backdrop(width: int, height: int) -> Image.Image:
    """Return a horizontal and a vertical gradient, so that each patch shows its position.

    Attention with rotary positions alone cannot distinguish uniform patches.
    """
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    red = 245 - 60 * x + 0 * y
    green = 235 - 25 * x - 25 * y
    blue = 245 - 60 * y + 0 * x
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """Paint an RGB image of a scene; position in the cell, size, tilt and shade of each thing are random."""
    width, height = scene.size
    image = _backdrop(width, height).copy()
    pen = ImageDraw.Draw(image)
    for index, thing in enumerate(scene.cells):
        if thing is None:
            continue
        radius = rng.uniform(17, 23)
        room_x, room_y = max(width / 4 - radius - 3, 1), max(height / 4 - radius - 3, 1)
        x = width * (1 + 2 * (index % 2)) / 4 + rng.uniform(-room_x, room_x)
        y = height * (1 + 2 * (index // 2)) / 4 + rng.uniform(-room_y, room_y)
        fill = tuple(int(min(255, max(0, channel + rng.uniform(-18, 18)))) for channel in COLOURS[thing.colour][1])
        if thing.kind in DIGITS:
            pen.text((x, y), thing.kind, fill=fill, font=_font(int(radius * 2.1)), anchor="mm", stroke_width=1)
        elif thing.kind == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(_polygon(thing.kind, x, y, radius, rng.uniform(-0.15, 0.15)), fill=fill)
    return image


def _unique(things: list[Thing], key: str) -> list[Thing]:
    values = [getattr(thing, key) for thing in things]
    return [thing for thing in things if values.count(getattr(thing, key)) == 1]


def ask_object(scene: Scene, language: str, rng: random.Random) -> Question:
    place = rng.choice(list(PLACES))
    thing = scene.at()[place]
    if language == "en":
        return Question("object", "en", f"What is at the {place}?", thing.name("en") if thing else "nothing")
    return Question("object", "zh", f"{PLACES[place]}是什么？", thing.name("zh") if thing else "没有东西")


def ask_colour(scene: Scene, language: str, rng: random.Random) -> Question | None:
    candidates = _unique(scene.things(), "kind")
    if not candidates:
        return None
    thing = rng.choice(candidates)
    if language == "en":
        return Question("colour", "en", f"What colour is the {thing.kind}?", thing.colour)
    noun = f"数字{thing.kind}" if thing.kind in DIGITS else SHAPES[thing.kind]
    return Question("colour", "zh", f"{noun}是什么颜色？", COLOURS[thing.colour][0])


def ask_count(scene: Scene, language: str, rng: random.Random) -> Question:
    things = scene.things()
    colour = rng.choice([thing.colour for thing in things] + [rng.choice(list(COLOURS)), ""])
    answer = str(sum(thing.colour == colour for thing in things) if colour else len(things))
    if language == "en":
        return Question("count", "en", f"How many {colour + ' ' if colour else ''}things are there?", answer)
    return Question("count", "zh", f"有几个{COLOURS[colour][0] + '的' if colour else ''}东西？", answer)


def ask_exists(scene: Scene, language: str, rng: random.Random) -> Question:
    things = scene.things()
    truth = bool(things) and rng.random() < 0.5
    if truth:
        thing = rng.choice(things)
    else:
        # Near misses: the colour of one thing with the kind of another, or one of them changed.
        pool = things or [Thing("red", "circle")]
        while True:
            thing = Thing(rng.choice(pool).colour, rng.choice(pool).kind)
            if rng.random() < 0.5:
                thing = Thing(rng.choice(list(COLOURS)), thing.kind)
            elif rng.random() < 0.5:
                thing = Thing(thing.colour, rng.choice(KINDS))
            if thing not in things:
                break
    if language == "en":
        return Question("exists", "en", f"Is there a {thing.name('en')}?", "yes" if truth else "no")
    return Question("exists", "zh", f"有没有{thing.name('zh')}？", "有" if truth else "没有")


def ask_place(scene: Scene, language: str, rng: random.Random) -> Question | None:
    places = [place for place, thing in scene.at().items() if thing and scene.things().count(thing) == 1]
    if not places:
        return None
    place = rng.choice(places)
    name = scene.at()[place].name(language)
    if language == "en":
        return Question("place", "en", f"Where is the {name}?", place)
    return Question("place", "zh", f"{name}在哪里？", PLACES[place])


def ask_digit(scene: Scene, language: str, rng: random.Random) -> Question | None:
    digits = [thing.kind for thing in scene.things() if thing.kind in DIGITS]
    if len(digits) != 1:
        return None
    text = "Which number is written?" if language == "en" else "写的是哪个数字？"
    return Question("digit", language, text, digits[0])


def ask_describe(scene: Scene, language: str, rng: random.Random) -> Question:
    if language == "en":
        parts = [f"{place}: {thing.name('en') if thing else 'nothing'}" for place, thing in scene.at().items()]
        return Question("describe", "en", "Describe the picture.", "; ".join(parts))
    parts = [f"{PLACES[place]}：{thing.name('zh') if thing else '没有东西'}" for place, thing in scene.at().items()]
    return Question("describe", "zh", "描述这张图片。", "；".join(parts))


def ask_sum(scene: Scene | None, language: str, rng: random.Random) -> Question:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    text = f"What is {left} plus {right}?" if language == "en" else f"{left}加{right}等于几？"
    return Question("sum", language, text, str(left + right))


def ask_translate(scene: Scene | None, language: str, rng: random.Random) -> Question:
    thing = Thing(rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
    if language == "en":
        return Question("translate", "en", f"What is {thing.name('en')} in Chinese?", thing.name("zh"))
    return Question("translate", "zh", f"{thing.name('zh')}用英语怎么说？", thing.name("en"))


ASK = {
    "object": ask_object,
    "colour": ask_colour,
    "count": ask_count,
    "exists": ask_exists,
    "place": ask_place,
    "digit": ask_digit,
    "describe": ask_describe,
    "sum": ask_sum,
    "translate": ask_translate,
}


def ask(scene: Scene | None, category: str, language: str, rng: random.Random) -> Question | None:
    """Return a question of `category`, or None if the scene allows none (two digits, no unique shape)."""
    return ASK[category](scene, language, rng)
