"""Draw the images of the default calibration set, and write its examples.jsonl.

python evaluation/general/make_calibration.py --out evaluation/calibration

It has the kinds of prompts of the general evaluation set, with other texts and images: a model must not be evaluated on
its calibration data.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from draw import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Canvas,
    Color,
    banner,
    bars,
    car,
    cloud,
    fir,
    label,
    lines,
    note,
    pie,
    receipt,
    sign,
    table,
    tiles,
    tree,
)
from make import Dialogue, ImageName, reply, single, system, user, write


def meadow(crown: Color, grass: Color, clouds: int) -> Image.Image:
    canvas = Canvas(378, 266)
    canvas.sky((120, 176, 226), (224, 236, 246), 190)
    for number in range(clouds):
        cloud(canvas, 70 + 110 * number, 50 + 18 * (number % 2), 46)
    canvas.box(0, 180, 378, 86, grass)
    for x, y, size in ((70, 214, 104), (182, 238, 130), (300, 208, 92)):
        tree(canvas, x, y, size, crown)
    fir(canvas, 246, 206, 96)
    return canvas.finish()


def parking(colors: list[Color]) -> Image.Image:
    """Draw two rows of cars, from left to right and from top to bottom."""
    canvas = Canvas(532, 294, "#6a7178")
    for number, color in enumerate(colors):
        x, y = 20 + 170 * (number % 3), 126 + 132 * (number // 3)
        canvas.box(x - 8, y - 96, 4, 110, "#f4f4f4")
        car(canvas, x, y, color)
    canvas.box(522, 30, 4, 242, "#f4f4f4")
    canvas.box(0, 0, 532, 18, "#7cbc5a")
    return canvas.finish()


def thermometer(degrees: int) -> Image.Image:
    """From 0 to 50 degrees."""
    canvas = Canvas(98, 476, "#f5f1e6")
    canvas.box(36, 16, 26, 410, "#ffffff", round=13, edge=INK, thick=2)
    canvas.disk(49, 432, 28, RED)
    canvas.box(43, 400 - 7 * degrees, 12, 7 * degrees + 14, RED)
    for step in range(6):
        y = 400 - 70 * step
        canvas.line([(62, y), (74, y)], INK, 2)
        canvas.text(78, y, str(10 * step), 12, anchor="lm")
    return canvas.finish()


IMAGES: dict[str, Callable[[], Image.Image]] = {
    "receipt": lambda: receipt(
        "MILLER HARDWARE",
        "208 Station Road  -  Tel. 555 0196",
        "2023-11-04  09:15",
        "120457",
        [
            ("Hammer", 1, 14.90),
            ("Nails, box", 3, 2.20),
            ("Paint white", 2, 11.75),
            ("Brush 40 mm", 1, 4.35),
            ("Sandpaper", 5, 0.80),
        ],
        60,
    ),
    "sign": lambda: sign(
        "Swimming Pool",
        "#23518f",
        {"Tue - Thu": "06:30 - 21:00", "Fri - Sun": "08:00 - 18:30", "Monday": "cleaning"},
    ),
    "note": lambda: note(
        [
            "Hello Tom,",
            "your parcel is with Mrs. Okoro,",
            "third floor, door 12. Ring twice,",
            "the bell is broken. I am back",
            "on Thursday at half past four.",
            "Greetings, Elif",
        ],
        -5,
    ),
    "label": lambda: label(
        "Lentil soup with carrots",
        "Ingredients: water, lentils (21 %), carrots (14 %), onion, olive oil, salt, cumin.\n"
        "Contains celery. Produced in a kitchen that also handles mustard.\n"
        "Heat slowly for six minutes; do not boil. Keep below 7 degrees.\n"
        "Use by: 02.08.2026     Lot: B3-55718",
        {"Energy": "268 kJ", "Fat": "1.9 g", "Sugars": "2.3 g", "Protein": "4.1 g", "Salt": "0.9 g"},
    ),
    "bars": lambda: bars(
        "Rainy days at the weather station",
        {"2018": 31, "2019": 44, "2020": 22, "2021": 38, "2022": 15, "2023": 27},
        GREEN,
        PURPLE,
    ),
    "lines": lambda: lines(
        "Passengers on two bus lines (hundreds)",
        {"Line 4": [2, 1, 9, 17, 11, 12, 18, 8, 3], "Line 9": [1, 1, 4, 8, 14, 15, 9, 5, 2]},
        [PURPLE, ORANGE],
    ),
    "pie": lambda: pie(
        "How pupils come to school",
        [("Bicycle", 29, GREEN), ("Bus", 33, BLUE), ("On foot", 21, ORANGE), ("Car", 12, RED), ("Tram", 5, GREY)],
    ),
    "table": lambda: table(
        [
            ("Planet", "Moons", "Day (h)", "Radius (km)"),
            ("Mars", "2", "24.6", "3390"),
            ("Jupiter", "95", "9.9", "69911"),
            ("Saturn", "146", "10.7", "58232"),
            ("Neptune", "16", "16.1", "24622"),
        ]
    ),
    "banner": lambda: banner("NIGHT MARKET   EVERY FRIDAY FROM 18:00   OLD HARBOUR   PIER 3", "#4a2a5e"),
    "tiles": lambda: tiles(187, 261, [PURPLE, GREEN, YELLOW, RED, BLUE]),
    "thermometer": lambda: thermometer(23),
    "parking": lambda: parking([GREEN, RED, "#f4f4f4", YELLOW, BLUE, RED]),
    "summer": lambda: meadow("#3d8b4e", "#7cbc5a", 1),
    "autumn": lambda: meadow("#c9702a", "#b5a552", 3),
}

BEES = """\
A honey bee that has found a good field of flowers does not keep it to herself. Back in the dark hive she walks a \
short straight line on the comb, shaking her body from side to side, then circles back to where she began and walks \
the line again. The angle between the line and the vertical is the angle between the flowers and the sun; the longer \
she shakes, the farther they are, roughly one kilometre for each second. Other bees follow her with their antennae, \
because they cannot see her. After a few rounds they fly out, and most of them arrive within some tens of metres of \
the right place. The dance was described by Karl von Frisch in the 1920s and doubted for decades, until small \
radar transmitters showed in 2005 that bees who had followed a dance do fly where it points, even when they are \
set free far from the hive."""

TEA = """\
茶叶按照加工方法可以分成六大类：绿茶、白茶、黄茶、青茶、红茶和黑茶。绿茶不发酵，采下来以后很快用高温杀青，所以颜色碧绿，味道清新；\
红茶完全发酵，茶汤红亮，香气浓郁；青茶也叫乌龙茶，发酵程度在两者之间。黑茶要经过渥堆，存放的时间越长，味道越醇厚，云南的普洱就是有名的例子。\
泡茶的水温也有讲究：绿茶用八十度左右的水，红茶用九十度以上，乌龙茶和黑茶则要用刚烧开的水。"""

P = ImageName
EXAMPLES: list[Dialogue] = [
    single("language", "en", "Why does bread rise? Answer as if to a child of ten."),
    single("language", "en", "Write a polite e-mail that moves a dentist's appointment from Monday to next week."),
    single("language", "zh", "请介绍三种适合初学者的运动，并说明理由。"),
    single("language", "zh", "把下面这句话翻译成英文：虽然下着大雨，比赛还是准时开始了。"),
    single("language", "es", "Explica qué es un eclipse de luna y cada cuánto ocurre."),
    single("language", "fr", "Propose un menu végétarien pour quatre personnes, avec une entrée et un dessert."),
    single("language", "de", "Was unterscheidet eine Wespe von einer Hornisse?"),
    single("language", "ja", "電車の中で気をつけるべきマナーを三つ教えてください。"),
    single("language", "ar", "ما هي فوائد شرب الماء في الصباح؟"),
    single("language", "ru", "Напиши короткое поздравление с днём рождения для коллеги."),
    single("language", "ko", "비가 오는 날에 할 수 있는 실내 활동을 추천해 주세요."),
    single("language", "pt", "Conte uma pequena história sobre um gato que tinha medo do mar."),
    single("code", "en", "Write a Python class for a bank account with deposit, withdraw and a balance in cents."),
    single(
        "code",
        "en",
        "What does this print, and why?\n\n```python\ndef add(item, seen=[]):\n    seen.append(item)\n"
        "    return seen\n\nprint(add(1), add(2))\n```",
    ),
    single("code", "zh", "用JavaScript写一个函数，统计字符串里每个字母出现的次数。"),
    single("code", "en", "Rewrite as one shell command: find all .log files older than 7 days and compress them."),
    single("arithmetic", "en", "Work out 936 / 12 + 45 * 3, step by step."),
    single("arithmetic", "en", "A train covers 210 km in 2 hours 20 minutes. What is its mean speed in km/h?"),
    single("arithmetic", "zh", "一个长方形的花园长十八米，宽七米，它的周长和面积各是多少？"),
    single("reasoning", "en", "If all clerks are early and nobody who is early is tired, can a clerk be tired?"),
    single("list", "en", "List seven things to pack for a weekend in the mountains, most important first."),
    single("list", "en", "Give the planets of the solar system as a Markdown table with their number of moons."),
    single("list", "zh", "列出做西红柿炒鸡蛋需要的材料和步骤，用数字编号。"),
    single("list", "en", 'Return JSON with the keys "name", "age" and "hobbies" for an invented person.'),
    single("long", "en", f"{BEES}\n\nSummarize this in two sentences, and name what was shown in 2005."),
    single("long", "zh", f"{TEA}\n\n根据上文，不同的茶应该用多少度的水？"),
    single("ocr", "en", P("receipt"), "Which item was bought most often, and how much change was given?"),
    single("ocr", "de", P("sign"), "Wann kann man am Samstag schwimmen gehen?"),
    single("ocr", "zh", P("note"), "这张纸条上写了什么？请翻译成中文。"),
    single("ocr", "en", "Copy the list of ingredients.", P("label")),
    single("chart", "en", P("bars"), "In which years were there more than 30 rainy days?"),
    single("chart", "fr", P("lines"), "Quelle ligne transporte le plus de passagers le matin ?"),
    single("chart", "zh", P("pie"), "有多少学生骑自行车或者走路上学？"),
    single("chart", "en", P("table"), "Sort these planets by the length of their day."),
    single("scene", "en", P("parking"), "How many cars are red, and where do they stand?"),
    single("scene", "es", P("summer"), "Describe el paisaje con todo detalle."),
    single("aspect", "en", P("banner"), "When does the market open, and at which pier?"),
    single("aspect", "zh", P("thermometer"), "温度计显示多少度？"),
    single("aspect", "en", P("tiles"), "Count the squares, the circles and the triangles."),
    single("two-images", "en", P("summer"), P("autumn"), "Which of these was painted in autumn? What gives it away?"),
    (
        "multi-turn",
        "en",
        [
            system("You are a patient teacher. Keep it short."),
            user("What is a prime number?"),
            reply("A whole number above 1 that only 1 and itself divide: 2, 3, 5, 7, 11."),
            user("Is 91 one?"),
        ],
    ),
    (
        "multi-turn",
        "zh",
        [
            user(P("parking"), "图里有几辆车？"),
            reply("图里有六辆车。"),
            user(P("bars"), "再看这张图，哪一年的雨天最少？"),
        ],
    ),
]


if __name__ == "__main__":
    write(EXAMPLES, IMAGES, __doc__)
