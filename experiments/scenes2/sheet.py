"""Contact sheet of test scenes with their questions: `python -m experiments.scenes2.sheet`."""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ivtp.data.scenes2 import make_scene

COLUMNS, LINE, MARGIN = 6, 11, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="test")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--target", type=Path, default=Path(__file__).with_name("scenes.jpg"))
    options = parser.parse_args()
    font = ImageFont.load_default(9)
    wide, high = 232 + MARGIN, options.size + 8 * LINE + 3 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * wide, -(-options.scenes // COLUMNS) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(options.scenes):
        scene, questions = make_scene(options.split, options.first + i, size=options.size)
        x, y = i % COLUMNS * wide, i // COLUMNS * high
        sheet.paste(Image.fromarray(scene.image), (x + (wide - options.size) // 2, y + MARGIN))
        for j, question in enumerate(questions):
            line = f"{question.text.removesuffix(' ?')}? {question.answer}"
            draw.text((x + MARGIN, y + options.size + 2 * MARGIN + j * LINE), line, fill="black", font=font)
    sheet.save(options.target, quality=62, optimize=True)
    print(f"{options.target}: {options.target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
