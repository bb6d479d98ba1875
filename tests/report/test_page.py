"""The page of a real run, in a real browser: what it shows is what was recorded, and it asks nobody for anything."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.running import by_label, lines, one_line, outcomes, run
from PIL import Image
from scipy import ndimage

BROWSER = ("chromium", "chromium-browser", "google-chrome")
ROWS = (
    "[{label:unpruned,pruner:none},{label:ivtp,pruner:ivtp},{label:'random',section:floor,pruner:random},"
    "{label:'topk {group}',section:floor,pruner:topk,sweep:{group:[3,6]}}]"
)
HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2"> what\'s "this" & that?',
    "{{ 7 * 7 }} ${7*7} `x` \\u003c <!-- <b>bold</b>",
    "👩‍👩‍👧 is the ❤️ red ?",
    "ما لون الدائرة \u202e drawkcab ؟",
    'first line\nsecond \\" + [window.pwned = 3] + "\\',
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("page")
    assert run(f"variants={ROWS}", "name=page", "viewer=2", output=output) == 0
    return output / "page"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSER)), None)
    if path is None:
        pytest.fail("no Chromium here: apt-get install -y --no-install-recommends chromium (or any of them on PATH)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open a report; on the way out: no error, no word on the console, no request but the file itself."""
    contexts, said, requests, files = [], [], [], []

    def open_page(path: Path, width: int = 1280, height: int = 900, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, reduced_motion="reduce", **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        files.append(path.as_uri())
        page.goto(files[-1])
        page.wait_for_selector("body[data-plots=drawn]", state="attached", timeout=30_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == files


def labels(page, select: str) -> list[str]:
    return page.locator(f"{select} option").all_inner_texts()


def choose(page, method: str, side: str = "a") -> None:
    label = next(text for text in labels(page, f"#method-{side}") if text.split(" (")[0] == method)
    page.select_option(f"#method-{side}", label=label)


def choose_sample(page, outcome: dict) -> None:
    page.select_option("#image", outcome["image"])
    page.select_option("#question", label=f"{outcome['family']}: {outcome['question']}")


def clip(page, side: str = "a") -> str:
    """What of the image is drawn alive: the viewer's picture itself."""
    return page.locator(f"#picture-{side} clipPath path").get_attribute("d")


def alive(page, side: str = "a") -> list[int]:
    cells = [cell.split("h1")[0].split(" ") for cell in clip(page, side).split("M")[1:]]
    return [18 * int(y) + int(x) for x, y in cells]


def pixels(page, side: str = "a") -> np.ndarray:
    """The picture as it is painted, 144 by 144."""
    with Image.open(io.BytesIO(page.locator(f"#picture-{side}").screenshot())) as picture:
        return np.asarray(picture.convert("RGB").resize((144, 144), Image.Resampling.BOX), float)


def target_patches(outcome: dict) -> np.ndarray:
    from ivtp.data.scenes2 import Scenes2

    data = Scenes2("test", 3)
    return next(s["patches"] for s in (data[i] for i in range(24)) if s["id"] == outcome["id"]).reshape(18, 18).numpy()


def test_it_is_one_small_file_that_forbids_itself_every_request(folder, visit):
    text = (folder / "report.html").read_text()
    assert len(text) < 3_000_000
    assert "default-src 'none'" in text
    visit(folder / "report.html")


def test_the_table_is_that_of_the_run_and_can_be_sorted(folder, visit):
    page = visit(folder / "report.html")
    rows = by_label(folder)
    shown = page.locator("#table tbody tr[data-row] th").all_inner_texts()
    assert shown == list(rows)
    heads = page.locator("#table thead th").all_inner_texts()
    assert {"budget", "tokens", "GFLOPs", "accuracy"} <= set(heads)
    tokens = heads.index("tokens")
    line = page.locator("#table tr[data-row]", has_text="ivtp").first
    assert line.locator("th, td").all_inner_texts()[tokens] == "36"
    assert "11.1 %" in line.inner_text()
    page.get_by_role("button", name="GFLOPs").press("Enter")
    floor = page.locator("#table tbody").nth(1).locator("tr[data-row] th").all_inner_texts()
    assert floor == sorted(floor, key=lambda label: -rows[label]["tflops"]["total"])
    page.get_by_role("button", name="GFLOPs").press("Enter")
    assert page.locator("#table tbody").nth(1).locator("tr[data-row] th").all_inner_texts() == floor[::-1]
    titles = [line[3:] for line in (folder / "table.md").read_text().splitlines() if line.startswith("## ")]
    assert page.locator("#more h3").all_inner_texts() == titles
    for fact in (rows["ivtp"]["code"], rows["ivtp"]["data"]["hash"], rows["ivtp"]["versions"]["torch"]):
        assert fact in page.locator("#about").inner_text()


def test_the_slider_shows_what_every_cut_kept(folder, visit):
    page = visit(folder / "report.html")
    record = by_label(folder)["ivtp"]
    schedule = [*record["cuts"]["vision"], *record["cuts"]["language"]]
    outcome = outcomes(folder, record)[3]
    choose(page, "ivtp")
    choose_sample(page, outcome)
    slider = page.locator("#cut-a")
    assert slider.get_attribute("max") == str(len(schedule))
    assert alive(page) == outcome["kept"]  # the last cut is where it starts
    pictures, painted = [clip(page)], [pixels(page)]
    for number in range(len(schedule) - 1, -1, -1):
        slider.press("ArrowLeft")
        kept = [patch for patch, lived in enumerate(outcome["lived"]) if ord(lived) - ord("0") >= number]
        assert alive(page) == kept
        assert len(kept) == (schedule[number - 1][1] if number else 324)
        assert f"{len(kept)} of 324 tokens" in page.locator("#state-a").inner_text()
        pictures.append(clip(page))
    assert len(set(pictures)) == len(schedule) + 1
    assert slider.input_value() == "0"
    painted.append(pixels(page))
    # Inner pixels of every patch: what lives is painted as before all cuts, what does not is dark.
    last, first = (image.reshape(18, 8, 18, 8, 3)[:, 2:6, :, 2:6].mean((1, 3)).reshape(324, 3) for image in painted)
    lives = np.isin(np.arange(324), outcome["kept"])
    framed = np.isin(np.arange(324), np.flatnonzero(ndimage.binary_dilation(target_patches(outcome), iterations=1)))
    assert np.abs(last - first)[lives & ~framed].max() < 12
    bright = first.max(1) > 140
    assert (bright & ~lives & ~framed).any()
    assert (last.max(1) < 0.75 * first.max(1))[bright & ~lives & ~framed].all()
    slider.press("ArrowRight")
    crossed = page.locator("#picture-a .now").get_attribute("d").count("M")
    assert crossed == 324 - schedule[0][1]


def test_the_picture_is_the_image_and_the_frame_is_around_the_target_patches(folder, visit):
    from ivtp.data.scenes2 import Scenes2

    page = visit(folder / "report.html")
    sample = next(s for s in (Scenes2("test", 3)[i] for i in range(24)) if s["patches"].any())
    choose(page, "unpruned")
    choose_sample(page, {**sample, "image": sample["image_id"]})
    inside = np.abs(pixels(page) - np.asarray(sample["image"], float))[8:136, 8:136]
    assert np.median(inside) < 6
    side = sample["patches"].reshape(18, 18).numpy()
    padded = np.pad(side, 1)
    edges = sum(int((padded != np.roll(padded, 1, axis)).sum()) for axis in (0, 1))
    assert page.locator("#picture-a .frame").get_attribute("d").count("M") == edges


def test_selects_change_the_answers_of_both_sides(folder, visit):
    page = visit(folder / "report.html")
    rows = by_label(folder)
    for side, label in (("a", "unpruned"), ("b", "topk 3"), ("a", "random"), ("b", "ivtp")):
        choose(page, label, side)
        found = outcomes(folder, rows[label])
        for outcome in (found[0], found[7]):
            choose_sample(page, outcome)
            text = page.locator(f"#answer-{side}").inner_text()
            assert f"“{outcome['prediction']}”" in text
            assert ("✓ right" if outcome["correct"] else "✗ wrong") in text
            assert outcome["early"] in text.splitlines()[1]
            assert outcome["question"] in page.locator("#current").inner_text()


def test_the_words_of_the_pseudo_cls_are_those_above_tau(folder, visit):
    page = visit(folder / "report.html")
    record = by_label(folder)["ivtp"]
    choose(page, "ivtp")
    for outcome in outcomes(folder, record)[:10]:
        choose_sample(page, outcome)
        words = [word.strip() for word, _ in outcome["words"]]
        passing = [word.strip() for word, score in outcome["words"] if score >= record["pruner"]["tau"]]
        assert page.locator("#words-a .word bdi").all_inner_texts() == words
        assert page.locator("#words-a .word.passes bdi").all_inner_texts() == passing
        mean = f"mean of {', '.join(passing)}" if passing else "no word reaches τ, so the visual CLS stands in"
        assert page.locator("#words-a p").last.inner_text() == f"Pseudo CLS: {mean}"
        heats = page.locator("#words-a .word").evaluate_all("all => all.map(e => +e.style.getPropertyValue('--heat'))")
        scores = [score for _, score in outcome["words"]]
        assert int(np.argmax(heats)) == int(np.argmax(scores)) or max(scores) <= 0


def test_flipped_answers_are_one_click_away(folder, visit):
    page = visit(folder / "report.html")
    rows = by_label(folder)
    before = {o["id"]: o for o in outcomes(folder, rows["unpruned"])}
    flipped = [o for o in outcomes(folder, rows["random"]) if o["prediction"] != before[o["id"]]["prediction"]]
    assert flipped, "choose another seed: nothing flips here"
    button = page.get_by_role("button", name="flipped answers of random")
    assert button.inner_text() == str(len(flipped))
    button.click()
    entries = page.locator("#list button")
    assert entries.count() == len(flipped)
    entries.nth(len(flipped) - 1).click()
    question = entries.nth(len(flipped) - 1).locator("bdi").first.inner_text()
    assert question in page.locator("#current").inner_text()
    assert page.locator("#answer-a").inner_text().split("”")[0] != page.locator("#answer-b").inner_text().split("”")[0]
    # 16 of the 20 questions are about the two images that are stored: the others say how to get theirs.
    page.select_option("#filter", "all")
    page.locator("#list button").last.click()
    assert "viewer=" in page.locator("#picture-a").inner_text()


def test_plots_have_every_row_and_tell_all_of_it(folder, visit):
    page = visit(folder / "report.html")
    marks = page.locator("#cost-plot .mark-symbol.role-mark path")
    assert marks.count() == len(by_label(folder))
    rows = by_label(folder)
    groups = [name for name in rows["unpruned"]["metrics"] if name.startswith(("accuracy/", "difficulty/"))]
    assert len(groups) > 8
    assert page.locator("#families-plot .mark-rect.role-mark path").count() == len(groups) * len(rows)
    marks.nth(1).scroll_into_view_if_needed()
    marks.nth(1).hover(force=True)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    cells = page.locator("#table tr[data-row='1']").locator("th, td:not(.flips)").all_inner_texts()
    assert [cell for cell in cells if cell and cell not in tooltip.inner_text()] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(folder, visit, scheme):
    page = visit(folder / "report.html", 360, 740, color_scheme=scheme, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("innerWidth") == 360
    assert page.locator("#table .scroll").evaluate("e => e.scrollWidth > e.clientWidth")
    assert page.locator(".scroll").evaluate_all("all => all.every(e => e.tabIndex === 0)")
    assert page.locator("#picture-b").bounding_box()["x"] > page.locator("#picture-a").bounding_box()["x"] + 100
    page.screenshot(path=folder / f"phone-{scheme}.png", full_page=True)


def test_dark_mode_is_dark_and_readable(folder, visit):
    def luminance(color: str) -> float:
        channels = [int(c) / 255 for c in color[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    backs = {}
    for scheme in ("light", "dark"):
        page = visit(folder / "report.html", color_scheme=scheme)
        style = "([s, p]) => getComputedStyle(document.querySelector(s))[p]"
        back = luminance(page.evaluate(style, ["body", "backgroundColor"]))
        for selector in ("body", ".quiet", "nav a", "#about dt", ".verdict"):
            text = luminance(page.evaluate(style, [selector, "color"]))
            contrast = (max(text, back) + 0.05) / (min(text, back) + 0.05)
            assert contrast >= 4.5, (scheme, selector, contrast)
        label = page.locator("#cost-plot .role-axis-label text").first
        assert abs(luminance(label.evaluate("e => getComputedStyle(e).fill")) - back) > 0.1
        backs[scheme] = back
    assert backs["dark"] < 0.05 < 0.8 < backs["light"]


def test_every_control_has_a_name_and_takes_the_keyboard(folder, visit):
    page = visit(folder / "report.html")
    nameless = page.evaluate(
        """[...document.querySelectorAll("select, input, button, summary")].filter(e => !e.getAttribute("aria-label")
            && !e.labels?.[0]?.textContent.trim() && !e.textContent.trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("[tabindex='-1']").count() == 0
    place = page.locator("#count").inner_text()
    page.locator("#next").press("Enter")
    assert page.locator("#count").inner_text() != place
    page.locator("#previous").press("Space")
    assert page.locator("#count").inner_text() == place


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on someone else's data whose every text is an attack; labels are rewritten in its records."""
    root = tmp_path_factory.mktemp("hostile")
    data = root / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number, text in enumerate(HOSTILE):
        name = f"{number} <b>'&\".png"
        Image.fromarray(rng.integers(0, 255, (60, 90 + 7 * number, 3), dtype=np.uint8)).save(data / name)
        row = {"id": f"{text}/{number}", "image": name, "question": text, "answer": HOSTILE[number - 1], "family": text}
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    (data / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    two = "variants=[{label:unpruned,pruner:none},{label:topk,pruner:topk}]"
    assert run(two, "data=folder", f"data.path={data}", "name=hostile", "logger=none", output=root, quick=False) == 0
    shutil.rmtree(data)  # the page never needs it again
    folder = root / "hostile"
    records = lines(folder / "results.jsonl")
    for record, label, section in zip(records, HOSTILE, HOSTILE[1:], strict=False):
        record |= {"label": label, "section": section, "series": label, "experiment": HOSTILE[0]}
    (folder / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from ivtp.cli.report import main

    about = json.loads((folder / "experiment.json").read_text()) | {"question": HOSTILE[1]}
    (folder / "experiment.json").write_text(json.dumps(about))
    assert main([str(folder)]) == 0
    return folder


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_texts_are_shown_as_they_are_and_do_nothing(hostile, visit, number):
    page = visit(hostile / "report.html")
    text = " ".join(HOSTILE[number].split())
    image = next(label for label in labels(page, "#image") if label.startswith(str(number)))
    page.select_option("#image", label=image)
    assert page.locator("#current bdi").first.inner_text() == text
    assert page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator(".lead").inner_text() == HOSTILE[1]
    assert page.locator("tr[data-row] th").all_inner_texts() == list(HOSTILE[:2])
    for button in page.locator(".flips button").all():
        button.click()
    page.locator("#cost-plot .mark-symbol.role-mark path").first.hover(force=True)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, b b, script:not([type])").count() == 0
    assert page.locator("#families-plot").get_by_text(HOSTILE[3][:6]).count() > 0


def test_the_page_can_be_written_again_from_the_folder_alone(folder, tmp_path):
    from ivtp.cli.report import main

    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    assert main([str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == before
    # A run that was stopped has no list of its rows: the newest of every label are taken.
    (copy / "experiment.json").unlink()
    assert main([str(copy)]) == 0
    assert "topk 6" in (copy / "report.html").read_text()


@pytest.mark.parametrize("arguments", [["no/such/folder"], [], ["one", "two"]])
def test_a_folder_without_results_is_refused_in_one_line(arguments, capsys):
    from ivtp.cli.report import main

    assert main(arguments) == 2
    assert "folder" in one_line(capsys.readouterr().err)


def test_outcomes_outside_the_viewer_stay_small(folder):
    found = outcomes(folder, by_label(folder)["ivtp"])
    assert sum("lived" in outcome for outcome in found) == 16  # two images, eight questions each
    for record in lines(folder / "results.jsonl"):
        stored = (folder / "outcomes" / f"{record['key']}.jsonl").read_bytes().splitlines()
        outside = [len(line) for line in stored if b'"lived"' not in line]
        assert len(outside) >= 4 and sum(outside) / len(outside) < 800
