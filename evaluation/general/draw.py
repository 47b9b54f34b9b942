"""Draw the images of the general sets with Pillow alone; a release of Pillow always draws the same pixels.

Functions with parameters draw images of several sets; IMAGES are those of the evaluation set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFont

SCALE = 3
"""Factor by which everything is drawn larger and then averaged, for smooth edges."""
Color = str | tuple[int, int, int]
Point = tuple[float, float]

INK, PAPER, GREY, GRID = "#22303c", "#ffffff", "#6b7780", "#dde3e8"
BLUE, ORANGE, GREEN, RED, PURPLE, YELLOW = "#2f6db5", "#e8862e", "#3f9b5f", "#c9413b", "#7d57a8", "#f2c230"


class Canvas:
    """Image of `width` x `height` pixels; lengths are in pixels, colours as in Pillow."""

    def __init__(self, width: int, height: int, color: Color = PAPER) -> None:
        self.width, self.height = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), color)
        self.pen = ImageDraw.Draw(self.image)

    def _points(self, points: list[Point]) -> list[Point]:
        return [(x * SCALE, y * SCALE) for x, y in points]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: Color | None,
        round: float = 0,
        edge: Color | None = None,
        thick: float = 0,
    ) -> None:
        corners = self._points([(x, y), (x + width, y + height)])
        self.pen.rounded_rectangle(corners, round * SCALE, fill, edge, thick * SCALE)

    def oval(self, x: float, y: float, across: float, down: float, fill: Color) -> None:
        """Draw an ellipse around (x, y); `across` and `down` are radii."""
        self.pen.ellipse(self._points([(x - across, y - down), (x + across, y + down)]), fill)

    def disk(self, x: float, y: float, radius: float, fill: Color) -> None:
        self.oval(x, y, radius, radius, fill)

    def slice(self, x: float, y: float, radius: float, start: float, end: float, fill: Color) -> None:
        """Draw a slice; angles are in degrees, clockwise from three o'clock."""
        self.pen.pieslice(self._points([(x - radius, y - radius), (x + radius, y + radius)]), start, end, fill)

    def polygon(self, points: list[Point], fill: Color) -> None:
        self.pen.polygon(self._points(points), fill)

    def line(self, points: list[Point], fill: Color, width: float = 2) -> None:
        self.pen.line(self._points(points), fill, round(width * SCALE), joint="curve")

    def text(self, x: float, y: float, words: str, size: float, fill: Color = INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SCALE)
        if "\n" in words:
            self.pen.multiline_text((x * SCALE, y * SCALE), words, fill, font, anchor, size * SCALE * 0.4)
        else:
            self.pen.text((x * SCALE, y * SCALE), words, fill, font, anchor)

    def sky(self, top: tuple[int, int, int], bottom: tuple[int, int, int], height: float) -> None:
        """Draw a vertical gradient over the upper `height`, in steps of four pixels, so that it compresses well."""
        for y in range(0, math.ceil(height), 4):
            share = y / height
            color = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
            self.box(0, y, self.width, 4, color)

    def finish(self) -> Image.Image:
        return self.image.reduce(SCALE)


# Text


def receipt(
    shop: str, street: str, day: str, number: str, bought: list[tuple[str, int, float]], paid: int
) -> Image.Image:
    """Five things `bought`: name, how many, price of one."""
    canvas = Canvas(360, 520, "#c8ccd0")
    canvas.box(20, 14, 320, 492, "#fdfcf7", round=4)
    canvas.text(180, 34, shop, 24, anchor="ma")
    canvas.text(180, 66, street, 13, GREY, "ma")
    canvas.text(40, 96, day, 14)
    canvas.text(320, 96, f"No. {number}", 14, anchor="ra")
    canvas.line([(40, 122), (320, 122)], GREY, 1)
    for line, (name, count, price) in enumerate(bought):
        y = 138 + 34 * line
        canvas.text(40, y, name, 17)
        canvas.text(220, y, f"{count} x", 17, GREY, "ra")
        canvas.text(320, y, f"{count * price:.2f}", 17, anchor="ra")
    total = sum(count * price for _, count, price in bought)
    canvas.line([(40, 314), (320, 314)], GREY, 1)
    canvas.text(40, 328, "TOTAL", 24)
    canvas.text(320, 328, f"{total:.2f}", 24, anchor="ra")
    canvas.text(40, 366, "Cash", 16, GREY)
    canvas.text(320, 366, f"{paid:.2f}", 16, GREY, "ra")
    canvas.text(40, 390, "Change", 16, GREY)
    canvas.text(320, 390, f"{paid - total:.2f}", 16, GREY, "ra")
    bars = random.Random(7)
    x = 70.0
    while x < 285:
        thick = bars.choice([1.5, 1.5, 3, 4.5])
        canvas.box(x, 424, thick, 44, INK)
        x += thick + bars.choice([2, 3, 4])
    canvas.text(180, 476, "Thank you!", 15, anchor="ma")
    return canvas.finish()


def sign(title: str, color: Color, hours: dict[str, str]) -> Image.Image:
    """Opening hours of three kinds of day, the last in yellow."""
    canvas = Canvas(480, 280, "#8fa9b8")
    for x in (120, 350):
        canvas.box(x, 200, 12, 80, "#5b6670")
    canvas.box(30, 24, 420, 190, color, round=14)
    canvas.box(37, 31, 406, 176, None, round=10, edge="#ffffff", thick=3)
    canvas.text(60, 52, title, 34, PAPER)
    for line, (days, time) in enumerate(hours.items()):
        fill = YELLOW if line == len(hours) - 1 else PAPER
        canvas.text(60, 106 + 34 * line, days, 24, fill)
        canvas.text(418, 106 + 34 * line, time, 24, fill, "ra")
    return canvas.finish()


def note(lines: list[str], tilt: float) -> Image.Image:
    """A sheet that lies askew by `tilt` degrees, counterclockwise."""
    canvas = Canvas(420, 330, "#f8f1c9")
    for y in range(76, 320, 40):
        canvas.line([(0, y), (420, y)], "#a9c4dd", 1)
    canvas.line([(46, 0), (46, 330)], "#e0a0a0", 1)
    for number, line in enumerate(lines):
        canvas.text(60, 73 + 40 * number, line, 25, "#26367a", "ls")
    sheet = canvas.image.convert("RGBA").rotate(tilt, Image.Resampling.BICUBIC, expand=True)
    table = Image.new("RGB", (500 * SCALE, 420 * SCALE), "#7b5a3e")
    table.paste(sheet, ((table.width - sheet.width) // 2, (table.height - sheet.height) // 2), sheet)
    return table.reduce(SCALE)


def label(title: str, small: str, facts: dict[str, str]) -> Image.Image:
    """Small print: letters of eight to eleven pixels; five `facts` per 100 g."""
    canvas = Canvas(500, 224, "#f4f4f4")
    canvas.box(8, 8, 484, 208, PAPER, edge=INK, thick=1)
    canvas.text(20, 18, title, 19)
    canvas.line([(20, 46), (480, 46)], INK, 1)
    canvas.text(20, 56, small, 11)
    for number, (name, amount) in enumerate(facts.items()):
        x = 20 + 94 * number
        canvas.box(x, 148, 86, 44, "#eef2f5", round=4)
        canvas.text(x + 43, 154, name, 11, GREY, "ma")
        canvas.text(x + 43, 170, amount, 14, anchor="ma")
    canvas.text(480, 198, "per 100 g", 8, GREY, "ra")
    return canvas.finish()


# Charts


def bars(title: str, values: dict[str, int], color: Color, highest: Color) -> Image.Image:
    """Six values of at most 50; the highest has a colour of its own."""
    canvas = Canvas(640, 420)
    canvas.text(320, 18, title, 21, anchor="ma")
    for step in range(6):
        y = 350 - 55 * step
        canvas.line([(70, y), (610, y)], GRID, 1)
        canvas.text(60, y, str(10 * step), 15, GREY, "rm")
    for number, (name, value) in enumerate(values.items()):
        x = 92 + 88 * number
        canvas.box(x, 350 - 5.5 * value, 56, 5.5 * value, highest if value == max(values.values()) else color)
        canvas.text(x + 28, 342 - 5.5 * value, str(value), 16, anchor="ms")
        canvas.text(x + 28, 362, name, 17, anchor="ma")
    canvas.line([(70, 350), (610, 350)], INK, 2)
    return canvas.finish()


def lines(title: str, curves: dict[str, list[int]], colors: list[Color]) -> Image.Image:
    """Curves of nine values up to 25 each, one every three hours."""
    canvas = Canvas(640, 400)
    canvas.text(320, 16, title, 20, anchor="ma")
    for step in range(6):
        y = 330 - 50 * step
        canvas.line([(64, y), (610, y)], GRID, 1)
        canvas.text(54, y, str(5 * step), 15, GREY, "rm")
    hours = list(range(0, 25, 3))
    for hour in hours:
        canvas.text(72 + 22 * hour, 342, f"{hour}h", 15, GREY, "ma")
    for number, (name, values) in enumerate(curves.items()):
        color, y = colors[number], 78 + 24 * number
        points = [(72 + 22 * hour, 330 - 10 * value) for hour, value in zip(hours, values, strict=True)]
        canvas.line(points, color, 3)
        for x, height in points:
            canvas.disk(x, height, 5, color)
        canvas.line([(88, y), (118, y)], color, 4)
        canvas.text(126, y, name, 17, anchor="lm")
    canvas.line([(64, 330), (610, 330)], INK, 2)
    return canvas.finish()


def pie(title: str, shares: list[tuple[str, int, Color]]) -> Image.Image:
    """Name, per cent and colour of each slice."""
    canvas = Canvas(560, 380)
    canvas.text(280, 16, title, 21, anchor="ma")
    start = -90.0
    for number, (name, share, color) in enumerate(shares):
        end = start + 3.6 * share
        canvas.slice(190, 212, 140, start, end, color)
        middle = math.radians((start + end) / 2)
        canvas.text(190 + 98 * math.cos(middle), 212 + 98 * math.sin(middle), f"{share} %", 16, PAPER, "mm")
        canvas.box(374, 110 + 42 * number, 24, 24, color, round=4)
        canvas.text(410, 122 + 42 * number, name, 20, anchor="lm")
        start = end
    return canvas.finish()


def table(rows: list[tuple[str, str, str, str]]) -> Image.Image:
    """Five rows, the first its head."""
    canvas = Canvas(600, 270)
    canvas.box(16, 16, 568, 44, INK, round=6)
    columns = [(36, "la"), (300, "ra"), (430, "ra"), (560, "ra")]
    for number, row in enumerate(rows):
        y = 27 + 46 * number + (4 if number else 0)
        if number and number % 2 == 0:
            canvas.box(16, y - 10, 568, 44, "#eef2f5")
        for (x, anchor), words in zip(columns, row, strict=True):
            canvas.text(x, y, words, 20, INK if number else PAPER, anchor)
    return canvas.finish()


# Scenes


def tree(canvas: Canvas, x: float, y: float, size: float, crown: Color = "#3d8b4e") -> None:
    """A round tree that stands at (x, y)."""
    canvas.box(x - size * 0.08, y - size * 0.6, size * 0.16, size * 0.6, "#6f4a2c")
    for across, up, radius in ((-0.22, 0.68, 0.26), (0.22, 0.68, 0.26), (0, 0.92, 0.3), (0, 0.62, 0.28)):
        canvas.disk(x + size * across, y - size * up, size * radius, crown)


def fir(canvas: Canvas, x: float, y: float, size: float) -> None:
    canvas.box(x - size * 0.05, y - size * 0.2, size * 0.1, size * 0.2, "#5d3f26")
    for step in range(3):
        bottom, half = y - size * (0.15 + 0.26 * step), size * (0.32 - 0.07 * step)
        canvas.polygon([(x - half, bottom), (x + half, bottom), (x, bottom - size * 0.38)], "#2f6b45")


def cloud(canvas: Canvas, x: float, y: float, size: float) -> None:
    for across, up, radius in ((-0.5, 0, 0.3), (-0.1, 0.15, 0.42), (0.4, 0.02, 0.34)):
        canvas.disk(x + size * across, y - size * up, size * radius, "#ffffff")
    canvas.box(x - size * 0.6, y, size * 1.2, size * 0.3, "#ffffff", round=size * 0.15)


def house() -> Image.Image:
    canvas = Canvas(640, 480)
    canvas.sky((112, 178, 232), (206, 232, 250), 330)
    canvas.disk(540, 80, 42, "#ffd54a")
    cloud(canvas, 150, 90, 70)
    cloud(canvas, 380, 60, 50)
    canvas.box(0, 330, 640, 150, "#7cbc5a")
    canvas.polygon([(300, 390), (350, 390), (440, 480), (250, 480)], "#d9c7a0")
    canvas.box(180, 210, 270, 180, "#f3e2c0")
    canvas.polygon([(155, 215), (475, 215), (315, 105)], "#b5483a")
    canvas.box(390, 110, 34, 78, "#8f5a45")
    canvas.box(295, 290, 58, 100, "#2f6db5", round=3)
    canvas.disk(343, 342, 4, YELLOW)
    for x in (208, 376):
        canvas.box(x, 258, 54, 54, "#ffffff")
        canvas.box(x + 5, 263, 44, 44, "#9fd0ea")
        canvas.line([(x + 27, 260), (x + 27, 310)], "#ffffff", 4)
        canvas.line([(x + 2, 285), (x + 52, 285)], "#ffffff", 4)
    tree(canvas, 90, 400, 170)
    tree(canvas, 560, 420, 140, "#4f9d45")
    for number in range(9):
        x = 20 + 26 * number
        canvas.box(x, 425, 14, 44, "#ffffff", round=4)
    canvas.box(14, 440, 236, 8, "#ffffff")
    for x, color in ((470, RED), (500, YELLOW), (530, PURPLE), (562, RED), (594, YELLOW)):
        canvas.line([(x, 462), (x, 440)], "#2f6b45", 3)
        for turn in range(5):
            angle = math.radians(72 * turn)
            canvas.disk(x + 7 * math.cos(angle), 434 + 7 * math.sin(angle), 5, color)
        canvas.disk(x, 434, 4, "#5d3f26")
    return canvas.finish()


def car(canvas: Canvas, x: float, y: float, color: Color) -> None:
    """A car of 150 pixels whose wheels stand at height y."""
    canvas.polygon([(x + 28, y - 44), (x + 50, y - 74), (x + 104, y - 74), (x + 128, y - 44)], color)
    canvas.polygon([(x + 38, y - 45), (x + 54, y - 67), (x + 74, y - 67), (x + 74, y - 45)], "#cfe6f5")
    canvas.polygon([(x + 80, y - 45), (x + 80, y - 67), (x + 100, y - 67), (x + 116, y - 45)], "#cfe6f5")
    canvas.box(x, y - 46, 150, 32, color, round=12)
    for wheel in (x + 34, x + 116):
        canvas.disk(wheel, y - 14, 16, "#1d242b")
        canvas.disk(wheel, y - 14, 7, "#aab4bc")
    canvas.disk(x + 146, y - 34, 5, "#fff3b0")


def street() -> Image.Image:
    canvas = Canvas(900, 600)
    canvas.sky((150, 196, 236), (228, 240, 248), 400)
    fronts = [
        (0, 190, "#c7796b", 3, "BAKERY"),
        (190, 150, "#e3cf9b", 4, "BOOKS"),
        (340, 220, "#8aa6b8", 3, "HOTEL LUNA"),
        (560, 160, "#b9a3c9", 4, "PHARMACY"),
        (720, 180, "#9fbf94", 3, "CAFE"),
    ]
    for x, width, color, floors, name in fronts:
        top = 400 - 74 - 72 * floors
        canvas.box(x, top, width, 400 - top, color)
        canvas.box(x, top, width, 10, "#4a4f55")
        columns = width // 60
        for floor in range(floors):
            for column in range(columns):
                left = x + width * (column + 0.5) / columns - 17
                lit = (floor + column + x) % 4 == 0
                canvas.box(
                    left, top + 24 + 72 * floor, 34, 44, "#ffe9a8" if lit else "#5f7f97", edge="#ffffff", thick=2
                )
        canvas.box(x + 8, 322, width - 16, 26, "#2b333b", round=4)
        canvas.text(x + width / 2, 335, name, 18, "#ffe9a8", "mm")
        canvas.box(x + 16, 354, width - 76, 46, "#cfe6f5", edge="#ffffff", thick=2)
        canvas.box(x + width - 50, 352, 32, 48, "#6f4a2c")
    canvas.box(0, 400, 900, 50, "#bfc4c8")
    canvas.box(0, 450, 900, 150, "#555c63")
    for x in range(20, 900, 110):
        canvas.box(x, 522, 60, 7, "#f4f4f4")
    for x in range(640, 760, 24):
        canvas.box(x, 456, 13, 138, "#f4f4f4")
    for x in (184, 554):
        canvas.box(x, 270, 6, 150, "#2b333b")
        canvas.disk(x + 3, 266, 11, "#fff3b0")
    tree(canvas, 340, 446, 72)
    canvas.box(716, 330, 8, 110, "#2b333b")
    canvas.box(705, 262, 30, 74, "#2b333b", round=6)
    for y, color in ((276, RED), (299, "#4d4420"), (322, "#20402a")):
        canvas.disk(720, y, 9, color)
    car(canvas, 60, 512, RED)
    car(canvas, 420, 508, YELLOW)
    car(canvas, 250, 592, BLUE)
    for x, shirt in ((690, "#7d57a8"), (716, "#3f9b5f")):
        canvas.disk(x, 470, 9, "#e9b996")
        canvas.box(x - 9, 480, 18, 34, shirt, round=6)
        canvas.box(x - 7, 510, 6, 28, INK)
        canvas.box(x + 1, 510, 6, 28, INK)
    return canvas.finish()


def landscape() -> Image.Image:
    canvas = Canvas(800, 500)
    canvas.sky((58, 74, 132), (250, 186, 132), 320)
    canvas.disk(590, 250, 46, "#ffe2a0")
    canvas.polygon([(0, 320), (150, 130), (290, 300), (400, 180), (560, 320)], "#5a5f86")
    canvas.polygon([(150, 130), (112, 178), (140, 170), (158, 186), (192, 181)], "#f1f4fa")
    canvas.polygon([(400, 180), (364, 216), (392, 208), (412, 222), (440, 215)], "#f1f4fa")
    canvas.polygon([(430, 320), (620, 220), (800, 300), (800, 330)], "#474c70")
    canvas.box(0, 318, 800, 120, "#3f6f96")
    for y, x, width in ((330, 520, 140), (344, 545, 90), (360, 500, 160), (378, 550, 80), (392, 520, 130)):
        canvas.box(x, y, width, 4, "#f2c79a", round=2)
    canvas.polygon([(250, 362), (330, 362), (316, 382), (264, 382)], "#7a3b2e")
    canvas.line([(290, 362), (290, 296)], "#3b2a20", 3)
    canvas.polygon([(294, 298), (294, 354), (332, 354)], "#f4f1e6")
    canvas.polygon([(286, 306), (286, 354), (258, 354)], "#e6dcc6")
    canvas.polygon([(0, 420), (260, 392), (560, 410), (800, 390), (800, 500), (0, 500)], "#3e5f3c")
    for x, y, size in ((60, 440, 150), (120, 452, 120), (180, 436, 96), (690, 446, 150), (748, 452, 110)):
        fir(canvas, x, y, size)
    canvas.polygon([(430, 462), (490, 420), (550, 462)], "#e8862e")
    canvas.polygon([(474, 462), (490, 432), (506, 462)], "#5d3217")
    for x, y in ((330, 60), (360, 76), (300, 84)):
        canvas.line([(x - 12, y - 6), (x, y), (x + 12, y - 6)], "#1f2440", 2.5)
    return canvas.finish()


def fruit() -> Image.Image:
    canvas = Canvas(560, 420, "#e9e2d4")
    canvas.box(0, 270, 560, 150, "#a9713f")
    for y in (300, 345, 395):
        canvas.line([(0, y), (560, y)], "#96612f", 2)
    canvas.box(30, 30, 130, 150, "#ffffff", edge="#b9a98d", thick=6)
    canvas.box(40, 40, 110, 130, "#9fd0ea")
    canvas.line([(95, 40), (95, 170)], "#ffffff", 5)
    for x, y, radius, color in (
        (220, 236, 38, RED),
        (290, 226, 40, "#d8452f"),
        (352, 238, 36, GREEN),
        (256, 200, 36, ORANGE),
        (320, 194, 36, ORANGE),
    ):
        canvas.disk(x, y, radius, color)
        canvas.disk(x - radius * 0.35, y - radius * 0.35, radius * 0.18, "#ffffff")
    canvas.slice(286, 262, 124, 0, 180, "#e8edf2")
    canvas.box(160, 254, 252, 18, "#cfd8e0", round=9)
    canvas.box(244, 376, 84, 12, "#cfd8e0", round=6)
    canvas.box(450, 236, 62, 92, "#2f6db5", round=8)
    canvas.oval(481, 238, 31, 8, "#5b3a22")
    canvas.pen.arc([(496 * SCALE, 254 * SCALE), (536 * SCALE, 306 * SCALE)], -90, 90, "#2f6db5", 9 * SCALE)
    for step in range(2):
        points = [(468 + 22 * step + 5 * math.sin(y / 7), 224 - y) for y in range(0, 44, 2)]
        canvas.line(points, "#cfc7ba", 3)
    canvas.polygon([(60, 372), (150, 356), (154, 364), (66, 384)], "#c8ced4")
    canvas.polygon([(20, 384), (64, 374), (66, 384), (24, 396)], "#3b2a20")
    return canvas.finish()


# Odd sizes


def banner(words: str, color: Color) -> Image.Image:
    canvas = Canvas(880, 110, color)
    canvas.text(24, 55, words, 25, PAPER, "lm")
    for number in range(11):
        x = 80 * number
        canvas.polygon([(x + 8, 0), (x + 72, 0), (x + 40, 26)], (RED, YELLOW, GREEN, ORANGE)[number % 4])
    return canvas.finish()


def tower() -> Image.Image:
    canvas = Canvas(120, 720)
    canvas.sky((126, 180, 228), (222, 238, 250), 720)
    canvas.polygon([(38, 150), (82, 150), (94, 690), (26, 690)], "#f4f1ec")
    for number in range(4):
        y = 190 + 130 * number
        spread = 0.0222 * (y - 150)
        canvas.polygon([(38 - spread, y), (82 + spread, y), (83.5 + spread, y + 62), (36.5 - spread, y + 62)], RED)
    canvas.box(28, 132, 64, 20, "#3a424a")
    canvas.box(44, 88, 32, 46, "#ffe9a8", edge="#3a424a", thick=3)
    canvas.polygon([(36, 90), (84, 90), (60, 50)], "#b5483a")
    canvas.box(50, 640, 20, 50, "#4a3524", round=8)
    canvas.box(0, 688, 120, 32, "#6f8f5a")
    return canvas.finish()


def tiny() -> Image.Image:
    canvas = Canvas(40, 30, "#bfe3f7")
    canvas.box(0, 22, 40, 8, "#6fae52")
    canvas.box(12, 12, 16, 12, RED)
    canvas.polygon([(9, 13), (31, 13), (20, 4)], INK)
    return canvas.finish()


def tiles(width: int, height: int, colors: list[Color]) -> Image.Image:
    """A shape every 60 pixels, round, square and pointed ones in turns."""
    canvas = Canvas(width, height, "#f2efe8")
    for row in range(height // 61):
        for column in range(width // 60):
            x, y, color = 33 + 60 * column, 38 + 61 * row, colors[(column + 2 * row) % len(colors)]
            if (row + column) % 3 == 0:
                canvas.disk(x, y, 22, color)
            elif (row + column) % 3 == 1:
                canvas.box(x - 20, y - 20, 40, 40, color)
            else:
                canvas.polygon([(x, y - 24), (x + 24, y + 19), (x - 24, y + 19)], color)
    return canvas.finish()


# Pairs


def room(evening: bool) -> Image.Image:
    """Evening: the lamp is lit, it is dark outside, the cat has gone and the clock is later."""
    canvas = Canvas(420, 308, "#b9a58a" if evening else "#e8dcc4")
    canvas.box(0, 236, 420, 72, "#6f5238" if evening else "#9c7550")
    canvas.box(36, 40, 120, 110, "#ffffff")
    canvas.box(44, 48, 104, 94, "#1d2748" if evening else "#9fd0ea")
    if evening:
        canvas.disk(124, 70, 12, "#f4f1d8")
        for x, y in ((60, 64), (84, 96), (104, 120), (68, 126)):
            canvas.disk(x, y, 2, "#ffffff")
    else:
        canvas.disk(70, 74, 15, "#ffd54a")
    canvas.line([(96, 44), (96, 146)], "#ffffff", 5)
    canvas.disk(226, 74, 30, "#ffffff")
    for turn, length in ((0 if evening else 270, 15), (-90 if evening else 0, 23)):
        angle = math.radians(turn + (150 if evening else 0))
        canvas.line([(226, 74), (226 + length * math.cos(angle), 74 + length * math.sin(angle))], INK, 3)
    canvas.box(120, 196, 170, 56, "#5b7f63", round=14)
    canvas.box(110, 168, 190, 56, "#6d9576", round=16)
    canvas.box(352, 130, 6, 120, "#4a4f55")
    canvas.box(332, 246, 46, 7, "#4a4f55", round=3)
    if evening:
        canvas.polygon([(322, 134), (388, 134), (420, 236), (290, 236)], "#d9c294")
    canvas.polygon([(322, 134), (388, 134), (374, 86), (336, 86)], "#ffe27a" if evening else "#b9854e")
    if not evening:
        canvas.oval(200, 184, 34, 20, "#3b3f45")
        canvas.disk(236, 172, 15, "#3b3f45")
        canvas.polygon([(224, 166), (228, 148), (237, 160)], "#3b3f45")
        canvas.polygon([(238, 160), (248, 148), (250, 166)], "#3b3f45")
        canvas.line([(168, 188), (152, 176), (150, 160)], "#3b3f45", 6)
    return canvas.finish()


def animal(kind: str) -> Image.Image:
    """A cat's or a dog's head."""
    cat = kind == "cat"
    canvas = Canvas(280, 260, "#dbe9e2") if cat else Canvas(224, 308, "#efe3d3")
    fur, inner, x, y = ("#e39a4a", "#f6c9a0", 140, 142) if cat else ("#9a6a43", "#6f4a2c", 112, 160)
    if cat:
        for side in (-1, 1):
            canvas.polygon([(x + side * 78, y - 30), (x + side * 68, y - 112), (x + side * 14, y - 66)], fur)
            canvas.polygon([(x + side * 66, y - 44), (x + side * 61, y - 90), (x + side * 30, y - 62)], inner)
        canvas.oval(x, y, 88, 76, fur)
        for across in (-20, 0, 20):
            canvas.line([(x + across, y - 72), (x + across * 0.7, y - 44)], "#b86f25", 6)
    else:
        canvas.oval(x, y, 70, 82, fur)
        for side in (-1, 1):
            canvas.oval(x + side * 72, y - 10, 22, 62, inner)
        canvas.oval(x, y + 34, 40, 34, "#e8cfae")
    for side in (-1, 1):
        canvas.oval(x + side * 32, y - 12, 13, 16, "#ffffff" if not cat else "#c8e06a")
        canvas.oval(x + side * 32, y - 10, 5 if cat else 8, 12 if cat else 9, "#1d242b")
    canvas.polygon([(x - 14, y + 16), (x + 14, y + 16), (x, y + 32)], "#c9615b" if cat else "#1d242b")
    canvas.line([(x - 22, y + 46), (x - 8, y + 48), (x, y + 34), (x + 8, y + 48), (x + 22, y + 46)], "#4a2f1c", 3)
    if cat:
        for side in (-1, 1):
            for rise in (-8, 0, 8):
                canvas.line([(x + side * 30, y + 30 + rise / 2), (x + side * 98, y + 24 + rise * 2)], "#ffffff", 2)
    else:
        canvas.oval(x, y + 62, 13, 17, "#e0787c")
    return canvas.finish()


IMAGES: dict[str, Callable[[], Image.Image]] = {
    "receipt": lambda: receipt(
        "CORNER GROCERY",
        "14 Harbour Street  -  Tel. 555 0142",
        "2024-05-17  18:42",
        "003871",
        [
            ("Milk 1 l", 2, 1.29),
            ("Rye bread", 1, 3.40),
            ("Tomatoes kg", 1, 2.85),
            ("Green tea", 3, 1.95),
            ("Olive oil", 1, 7.60),
        ],
        25,
    ),
    "sign": lambda: sign(
        "City Library",
        "#1d5c3b",
        {"Mon - Fri": "09:00 - 19:30", "Saturday": "10:00 - 16:00", "Sunday": "closed"},
    ),
    "note": lambda: note(
        [
            "Dear Mira,",
            "the train leaves at 7:15 from",
            "platform 9. Please bring the",
            "blue folder and two apples.",
            "See you there!",
            "Jonas",
        ],
        7,
    ),
    "label": lambda: label(
        "Oat biscuits with honey",
        "Ingredients: oat flakes (42 %), wheat flour, butter, honey (9 %), sugar, egg, salt.\n"
        "Contains gluten, milk and egg. May contain traces of nuts.\n"
        "Store in a cool, dry place. Once opened, eat within 10 days.\n"
        "Best before: 30.11.2025     Lot: K7-20419",
        {"Energy": "1920 kJ", "Fat": "18.5 g", "Sugars": "21.0 g", "Protein": "7.4 g", "Salt": "0.6 g"},
    ),
    "bars": lambda: bars(
        "Visitors of the museum, thousands",
        {"Jan": 12, "Feb": 18, "Mar": 27, "Apr": 41, "May": 46, "Jun": 33},
        BLUE,
        ORANGE,
    ),
    "lines": lambda: lines(
        "Mean temperature by hour (degrees C)",
        {"Coast": [13, 12, 12, 15, 18, 20, 19, 16, 13], "Desert": [9, 6, 5, 13, 20, 24, 22, 15, 9]},
        [BLUE, RED],
    ),
    "pie": lambda: pie(
        "Where the electricity comes from",
        [("Wind", 38, BLUE), ("Sun", 24, YELLOW), ("Water", 17, GREEN), ("Gas", 15, RED), ("Other", 6, GREY)],
    ),
    "table": lambda: table(
        [
            ("Train", "Departs", "Arrives", "Price"),
            ("IC 204", "06:58", "10:31", "42.50"),
            ("RE 17", "07:24", "12:05", "19.90"),
            ("Night 3", "22:47", "07:12", "61.00"),
            ("IC 208", "10:58", "14:31", "38.00"),
        ]
    ),
    "house": house,
    "street": street,
    "landscape": landscape,
    "fruit": fruit,
    "banner": lambda: banner("SPRING FAIR   12 - 14 APRIL   RIVERSIDE PARK   FREE ENTRY", "#20405e"),
    "tower": tower,
    "tiny": tiny,
    # No side is a multiple of a patch.
    "tiles": lambda: tiles(307, 199, [BLUE, ORANGE, GREEN, RED, PURPLE, YELLOW]),
    "room-day": lambda: room(False),
    "room-evening": lambda: room(True),
    "cat": lambda: animal("cat"),
    "dog": lambda: animal("dog"),
}
