"""Made-up copies of the benchmarks' data sets, eight rows each, in the schema that they have on the hub (parquet with
embedded images), about scenes that the embedded model knows."""

from __future__ import annotations

from pathlib import Path

from ivtp.data.scenes2 import make_scene

ROWS = 8


def scene(i: int):
    """PIL image and questions by family of scene `i`."""
    from PIL import Image

    made, questions = make_scene("test", i)
    return Image.fromarray(made.image), {question.family: question for question in questions}


def ten(answer: str, *others: str) -> list[str]:
    """What ten people said."""
    return [answer] * (10 - len(others)) + list(others)


def options(i: int, answer: str) -> tuple[dict[str, str], str]:
    """Four options, and the letter of the right one, which is another in each document."""
    words = ["white", "green", "black", "purple", "orange"]
    given = [word for word in words if word != answer][:3]
    given.insert(i % 4, answer)
    return dict(zip("ABCD", given, strict=True)), "ABCD"[i % 4]


def vqav2(i, image, q):
    q = q["attribute"]
    answers = [
        {"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(ten(q.answer, "thing", "it"))
    ]
    return {
        "question_type": "what", "multiple_choice_answer": q.answer, "answers": answers, "image_id": i, "answer_type": "other",
        "question_id": 100 + i, "question": q.text, "image": image, "answer": q.answer,
    }  # fmt: skip


def gqa(i, image, q):
    q = q["spatial"] if i % 2 else q["attribute"]
    return {
        "id": f"q{i}",
        "imageId": f"n{i}",
        "question": q.text,
        "answer": q.answer,
        "fullAnswer": f"It is {q.answer}.",
    }


def vizwiz(i, image, q):
    q = q["text"]
    return {
        "question_id": f"VizWiz_val_{i:08d}", "image": image, "question": q.text, "answers": ten(q.answer, "unanswerable"),
        "category": "other",
    }  # fmt: skip


def scienceqa(i, image, q):
    choices, _ = options(i, q["attribute"].answer)
    return {
        "image": image, "question": q["attribute"].text, "choices": list(choices.values()), "answer": i % 4, "hint": "",
        "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "physics", "category": "Shapes",
        "skill": "Identify", "lecture": "", "solution": "",
    }  # fmt: skip


def textvqa(i, image, q):
    q = q["text"]
    return {
        "image_id": f"i{i}", "question_id": i, "question": q.text, "question_tokens": q.text.split(), "image": image,
        "image_width": 144, "image_height": 144, "answers": ten(q.answer, "number"), "image_classes": ["Poster"],
        "set_name": "val", "ocr_tokens": [q.answer, "red"], "answer": q.answer,
    }  # fmt: skip


def pope(i, image, q):
    """One label is wrong, so that no model is right about everything."""
    q = q["exist"]
    answer = {"yes": "no", "no": "yes"}[q.answer] if i == 5 else q.answer
    return {
        "id": str(i), "question_id": str(i), "question": q.text, "answer": answer, "image_source": f"s{i}", "image": image,
        "category": ("adversarial", "popular", "random")[i % 3],
    }  # fmt: skip


def mme(i, image, q):
    """Two questions about each image, one to be answered with yes, the other with no."""
    image, q = scene(i // 2)
    word = q["attribute"].answer
    asked = [f"is there a {word} ?", "is there a black hole ?"][i % 2]
    return {
        "question_id": f"{'count' if i < 4 else 'code_reasoning'}/{i // 2}.png", "image": image, "question": asked,
        "answer": ["Yes", "No"][i % 2], "category": "count" if i < 4 else "code_reasoning",
    }  # fmt: skip


def mmbench(i, image, q):
    choices, right = options(i, q["attribute"].answer)
    return {
        "index": i, "question": q["attribute"].text, "hint": "nan", "answer": right, **choices, "category": "shape",
        "image": image, "source": "made up", "L2-category": "attribute", "comment": "nan", "split": "dev",
    }  # fmt: skip


def seedbench(i, image, q):
    choices, right = options(i, q["attribute"].answer)
    return {
        "answer": right, **{f"choice_{letter.lower()}": text for letter, text in choices.items()}, "data_id": str(i),
        "data_type": "video" if i >= 6 else "image", "question": q["attribute"].text, "question_id": str(i),
        "question_type_id": 1, "image": [image] if i < 6 else [image, scene(i + 20)[0]], "segment": None,
    }  # fmt: skip


def llava_wild(i, image, q):
    return {
        "question_id": i, "question": q["attribute"].text, "image": image, "image_id": f"{i}.jpg",
        "category": ("conv", "detail", "complex")[i % 3], "gpt_answer": q["attribute"].answer, "caption": "a scene",
    }  # fmt: skip


def mmvet(i, image, q):
    return {
        "question_id": f"v1_{i}", "question": q["attribute"].text, "answer": q["attribute"].answer, "image": image,
        "image_source": "made up", "capability": ["rec", "rec,ocr", "rec,spat"][i % 3],
    }  # fmt: skip


SCHEMAS = {
    "vqav2": (vqav2, "data/validation"),
    "gqa": (gqa, "testdev_balanced_instructions/testdev"),
    "vizwiz": (vizwiz, "data/val"),
    "scienceqa_img": (scienceqa, "ScienceQA-IMG/test"),
    "textvqa": (textvqa, "data/validation"),
    "pope": (pope, "data/test"),
    "mme": (mme, "data/test"),
    "mmbench": (mmbench, "en/dev"),
    "mmbench_cn": (mmbench, "cn/dev"),
    "seedbench": (seedbench, "data/test"),
    "llava_in_the_wild": (llava_wild, "data/train"),
    "mmvet": (mmvet, "data/test"),
}
SAME = {"textvqa_ocr": "textvqa", "mme_perception": "mme"}


def write(name: str, folder: Path, rows: int = ROWS) -> Path:
    """The data set of a config, as a folder that a download from the hub would leave."""
    from datasets import Dataset, Features, Image, List

    make, split = SCHEMAS[SAME.get(name, name)]

    def store(rows: list[dict], place: str) -> None:
        data = Dataset.from_list(rows)
        features = Features(data.features)
        for column in ("image",) if "image" in rows[0] else ():
            features[column] = List(Image()) if isinstance(rows[0][column], list) else Image()
        path = folder / f"{place}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.cast(features).to_parquet(path)

    scenes = [scene(i) for i in range(rows)]
    store([make(i, *scenes[i]) for i in range(rows)], split)
    if name == "gqa":
        store(
            [{"id": f"n{i}", "image": image} for i, (image, _) in enumerate(scenes)], "testdev_balanced_images/testdev"
        )
    parts = [place.parent.name for place in folder.rglob("*.parquet") if place.parent.name != "data"]
    if parts:  # several parts: the hub declares them in the README
        lines = [
            f"- config_name: {part}\n  data_files:\n  - split: {next((folder / part).glob('*')).name.split('-')[0]}\n"
            f"    path: {part}/*.parquet\n"
            for part in parts
        ]
        (folder / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    return folder
