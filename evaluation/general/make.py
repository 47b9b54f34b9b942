"""Draw the images of the general evaluation set, and write its examples.jsonl.

python evaluation/general/make.py --out evaluation/general
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from draw import IMAGES

Dialogue = tuple[str, str, list[dict[str, Any]]]
"""Category, language, messages."""


class ImageName(str):
    """Name of an image, among texts."""


def user(*parts: str) -> dict[str, Any]:
    content = [
        {"type": "image", "image": f"images/{part}.png"}
        if isinstance(part, ImageName)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def reply(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": words}]}


def system(words: str) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": "text", "text": words}]}


STORY = """\
The lighthouse on Gull Island was built in 1867 by two brothers, Anton and Peter Lindqvist, who had been masons \
in the harbour town across the bay. It took them three summers. The stone came by barge, forty blocks at a time, \
and twice a barge was lost in the strait between the island and the mainland. The tower is thirty-one metres \
high and has one hundred and fifty-two steps, of which the ninth from the top is a little higher than the \
others; visitors stumble there to this day, and children are told that Peter made it so on purpose, to wake the \
keeper who came up half asleep.

For the first fifty years the lamp burned colza oil and later paraffin. Its light could be seen eighteen sea \
miles away in clear weather. In 1921 it was replaced by an electric lamp, fed by a generator that stood in a \
shed beside the keeper's house and that was so loud that the keeper's wife, Ingrid Berg, kept her hens at the \
other end of the island. She also kept the weather diary. From 1919 to 1954 she wrote down, three times a day, \
the wind, the clouds, the temperature and the ships that passed, and on Sundays she added what had been for \
dinner. Meteorologists have used her thirty-five volumes ever since to study how the storms of the region have \
changed; historians, who came later, prefer the dinners.

The last keeper left in 1983, when the light became automatic. The house stood empty for eleven years, and the \
roof of the shed fell in. Then a school teacher from the town, Maria Solano, found the diaries in the archive \
and began to visit the island with her classes. Her pupils repaired the windows, painted the door green and, \
with the help of a carpenter, built bunk beds for twelve. Today the house is a small museum and hostel. It is \
open from May to September and closed on Tuesdays, because on Tuesdays the boat carries the island's post, fuel \
and bread and has no room for guests. A night costs nine coins for children and fifteen for adults, and whoever \
climbs the tower before breakfast gets a boiled egg for free - from hens that still live at the other end of the \
island."""

MEETING = """\
会议纪要：三月十二日上午九点，项目组在二楼会议室开会，到会七人，王敏主持。第一项，李强报告了测试的进展：上周一共运行了二百四十个用例，\
其中二百二十九个通过，十一个失败；失败的用例里有八个与网络超时有关，另外三个是新版本引入的错误，已经分配给陈静，要求星期五之前修好。\
第二项，讨论了交付的日期。客户希望四月初能看到第一版，但是翻译和文档还没有完成，大家同意先交付中文界面，英文界面推迟两个星期。\
第三项，预算。目前已经用掉百分之六十二，主要花在服务器和外包测试上；赵磊建议把夜间的测试改到便宜的机器上运行，估计每个月能省下四千元。\
最后决定：下一次会议改在三月十九日下午两点，地点不变，由李强准备演示。"""


def single(category: str, language: str, *parts: str) -> Dialogue:
    return category, language, [user(*parts)]


P = ImageName
EXAMPLES: list[Dialogue] = [
    single("language", "en", "Explain in three sentences why the sea is salty."),
    single("language", "zh", "请用三句话介绍一下长城的历史。"),
    single("language", "es", "¿Cuáles son las ventajas de viajar en tren? Menciona tres."),
    single("language", "ar", "اكتب رسالة قصيرة إلى صديق تدعوه فيها إلى العشاء يوم الجمعة."),
    single("language", "hi", "मानसून भारत की खेती के लिए क्यों महत्वपूर्ण है? संक्षेप में बताइए।"),
    single("language", "ja", "日本の四季の特徴を、それぞれ一文で説明してください。"),
    single("language", "ru", "Объясни простыми словами, почему зимой дни короче, чем летом."),
    single("language", "fr", "Traduis en anglais : « Il pleut depuis ce matin, mais nous sortirons quand même. »"),
    single("language", "ko", "김치를 만드는 방법을 간단히 순서대로 알려 주세요."),
    single(
        "code",
        "en",
        "Write a Python function that returns the second largest number of a list, or None.",
    ),
    single(
        "code",
        "en",
        "What is wrong here, and how do I mend it?\n\n```c\nint sum(int *a, int n) {\n\tint s;\n"
        "\tfor (int i = 0; i <= n; i++)\n\t\ts += a[i];\n\treturn s;\n}\n```",
    ),
    single("code", "de", "Schreibe eine SQL-Abfrage: die fünf Kunden mit den meisten Bestellungen im Jahr 2023."),
    single("arithmetic", "en", "What is 4827 + 3659 - 1248? Show the steps."),
    single(
        "arithmetic", "en", "A jacket costs 80. It is reduced by 15 %, then by another 10 %. What does it cost now?"
    ),
    single("arithmetic", "zh", "小明有三十六颗糖，分给四个朋友，每人一样多，自己留下八颗。每个朋友得到几颗？"),
    single(
        "reasoning",
        "en",
        "Anna is older than Ben. Cleo is younger than Ben, older than Dan. Who is second oldest?",
    ),
    single(
        "reasoning",
        "en",
        "All plants that flower need sun. A fern does not flower. Does it follow that it needs no sun?",
    ),
    single("short", "en", "Hi"),
    single("short", "any", "?"),
    single(
        "long",
        "en",
        f"{STORY}\n\nWhen did the light become electric, and why is the hostel closed on Tuesdays?",
    ),
    single("long", "zh", f"{MEETING}\n\n请列出会议的三项决定，并说明下一次会议的时间。"),
    single("ocr", "en", P("receipt"), "What was bought, and what is the total?"),
    single("ocr", "es", P("sign"), "¿A qué hora cierra la biblioteca el sábado?"),
    single("ocr", "en", P("note"), "Read the note aloud, word for word."),
    single("ocr", "fr", "Quels allergènes sont mentionnés ?", P("label")),
    single("chart", "en", P("bars"), "Which month had the most visitors, and how many more than in February?"),
    single("chart", "en", P("lines"), "Describe how the two curves differ over the day."),
    single("chart", "zh", P("pie"), "哪两种能源加起来超过一半？"),
    single("chart", "de", P("table"), "Welcher Zug ist der billigste, und wann fährt er ab?"),
    single("scene", "en", P("house"), "Describe this picture in detail."),
    single("scene", "en", P("street"), "List the shops from left to right, and the colours of the cars."),
    single("scene", "ja", P("landscape"), "この絵には何が描かれていますか。"),
    single("scene", "ru", P("fruit"), "Сколько фруктов в вазе и какого они цвета?"),
    single("aspect", "en", P("banner"), "When and where is the fair?"),
    single("aspect", "en", P("tower"), "What is this, and how many red stripes does it have?"),
    single("aspect", "en", P("tiny"), "What can be seen here?"),
    single("aspect", "ar", P("tiles"), "كم دائرة توجد في الصورة؟"),
    single(
        "two-images", "en", P("room-day"), P("room-evening"), "What has changed from the first picture to the second?"
    ),
    single(
        "two-images",
        "en",
        "First animal:",
        P("cat"),
        "Second animal:",
        P("dog"),
        "Name both, and one way to tell them apart.",
    ),
    single("two-images", "hi", P("tower"), P("banner"), "इन दोनों चित्रों में क्या अंतर है?"),
    (
        "multi-turn",
        "en",
        [
            user("I have eggs, spinach and an onion. What can I cook?"),
            reply("An omelette: fry the onion, add the spinach, then pour in the beaten eggs."),
            user("And if I had potatoes as well?"),
        ],
    ),
    (
        "multi-turn",
        "en",
        [
            user(P("house"), "What colour is the door?"),
            reply("The door is blue."),
            user("And the roof? Which of the two is darker?"),
        ],
    ),
    (
        "multi-turn",
        "es",
        [
            user("Te voy a enseñar un gráfico. ¿Estás listo?"),
            reply("Sí, enséñamelo."),
            user(P("pie"), "¿Cuál es la fuente más pequeña?"),
        ],
    ),
    (
        "multi-turn",
        "zh",
        [
            system("你是一个简短回答问题的助手。"),
            user(P("cat"), "这是什么动物？"),
            reply("这是一只猫。"),
            user(P("dog"), "那么这个呢？"),
            reply("这是一只狗。"),
            user("它们的毛是什么颜色的？"),
        ],
    ),
]


def records(examples: list[Dialogue]) -> list[dict[str, Any]]:
    """Return the records of examples.jsonl; ids are numbered within their category."""
    lines, counts = [], {}
    for category, language, messages in examples:
        counts[category] = counts.get(category, 0) + 1
        identifier = f"{category}-{counts[category]:02}"
        lines.append({"id": identifier, "category": category, "language": language, "messages": messages})
    return lines


def write(examples: list[Dialogue], images: dict[str, Callable[[], Image.Image]], about: str) -> None:
    """Write the images and examples of a set to the folder of the command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, draw in images.items():
        draw().save(out / "images" / f"{name}.png", optimize=True)
    lines = (json.dumps(record, ensure_ascii=False) for record in records(examples))
    (out / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(examples)} examples, {len(images)} images")


if __name__ == "__main__":
    write(EXAMPLES, IMAGES, __doc__)
