"""The label page in a real browser, by keyboard alone; skips where there is none."""

import re
from collections import Counter
from importlib import resources

import pytest
from chromium import open_browser, until
from PIL import Image

import vitcut
from vitcut.cli import main
from vitcut.errors import TaskError
from vitcut.labelling.gallery import open_gallery
from vitcut.task import load_task
from vitcut.wordnet import imagenet_names

ANIMALS = resources.files("vitcut") / "assets" / "tasks" / "animals.yaml"
TINY = ["--width", "16", "--depth", "1", "--num-heads", "2", "--mlp-ratio", "2"]
QUICK = ["--image-size", "16", "--patch-size", "8", "--epochs", "1", "--warmup-epochs", "0"]
PLAIN = ["--augmentation", "none", "--precision", "float32", "--compile=false", "--device", "cpu"]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def visit(browser):
    """Opens pages; at the end there must be no error, and no request but to a page's own place."""
    requests, errors, places = [], [], []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def visited(place, expected=()):
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on(
            "console",
            lambda message: (
                None
                if any(one in message.text for one in expected)
                else errors.append(message.text)
            ),
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: dialog.accept())
        places.append(place)
        page.goto(place)
        return page

    yield visited
    assert errors == []
    for url in requests:
        own = url.startswith(("data:image/jpeg;base64,", "data:,"))
        assert own or any(url.startswith(place) for place in places), url
    context.close()


@pytest.fixture
def visit_file(visit, tmp_path):
    def visited(source, **more):
        out = tmp_path / "page.html"
        vitcut.label(source, task=tmp_path / "new.yaml", out=out, **more)
        return visit(out.as_uri())

    return visited


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def typed(page, text):
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def saved_by(page, tmp_path):
    with page.expect_download() as download:
        page.keyboard.press("e")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    return path


def decided(page):
    return page.locator("#progress").inner_text()


def test_two_hundred_classes_are_labelled_by_keyboard_alone(visit_file, photos, tmp_path):
    page = visit_file(photos)
    groups = page.locator("#groups li strong").all_inner_texts()
    assert len(groups) == 6
    ids = list(imagenet_names())[:200]
    expected, out = {}, {}
    assert decided(page).startswith("0 of 200 classes decided")
    press(page, "g")  # A group of its own, which gets the key 7.
    typed(page, "Fish & <chips>")
    expected[ids[0]] = "Fish & <chips>"
    for at, own in enumerate(ids[1:], 1):
        if at % 40 == 0:
            press(page, "x")
            out[own] = "left out"
        elif at % 25 == 0:
            press(page, "s")
            out[own] = "not sure"
        else:
            press(page, str(at % 7 + 1))
            expected[own] = [*groups, "Fish & <chips>"][at % 7]
    assert decided(page).startswith("200 of 200 classes decided")
    assert page.locator("#said").inner_text().endswith("All classes are decided.")

    press(page, "/")
    typed(page, "goldfish")
    press(page, "n")
    typed(page, 'a: "koi" # \u732b')
    press(page, "/")
    page.keyboard.press("Escape")
    group = expected["n01443537"]
    press(page, "r")
    typed(page, "renamed")
    expected = {own: "renamed" if one == group else one for own, one in expected.items()}
    press(page, "m")
    other = next(one for one in groups if one != group)
    typed(page, other)
    press(page, "z", "y", "z")  # Merged no longer, again, no longer.
    press(page, "0", "z")

    task = load_task(saved_by(page, tmp_path))
    assert {item.id: item.group for item in task.classes} == expected
    assert task.excluded == out
    assert (
        dict(zip(task.class_ids, task.class_names, strict=True))["n01443537"] == 'a: "koi" # \u732b'
    )
    assert set(Counter(expected.values())) == set(task.groups)
    words = ["train", "--source", str(photos), "--task", str(tmp_path / "new.yaml")]
    assert main([*words, *TINY, *QUICK, *PLAIN, "--out", str(tmp_path / "run")]) == 0


def test_a_served_page_saves_each_change_and_goes_on_where_it_ended(visit, serve, photos, tmp_path):
    with open_gallery(str(photos)) as gallery:
        server = serve(gallery)
        page = visit(server.address)
        page.wait_for_selector("#pictures")
        assert page.locator("#pictures img").count() == 3
        press(page, "p")
        assert page.locator("#pictures img").count() == 4
        until(lambda: page.evaluate("[...document.images].every(one => one.naturalWidth === 24)"))
        press(page, *["Enter"] * 9)
        until(lambda: server.path.exists() and counted(server.path)[0] == 9)
        saved(page)
        page.reload()
        page.wait_for_selector("#progress:has-text('9 of 200')")
        press(page, "a", "s")
        until(lambda: counted(server.path) == (199, 6, 1))
        saved(page)
        assert list(tmp_path.glob(".new*")) == []


def saved(page):
    page.wait_for_selector("#saved:has-text('new.yaml is saved')")


def write(path, text):
    """As editors do, so that nobody reads half of it."""
    other = path.with_name("other.yaml")
    other.write_text(text)
    other.replace(path)


def counted(path):
    """Classes, groups and classes left out; None before there are two groups."""
    try:
        task = load_task(path)
    except TaskError:
        return (None, None, None)
    return len(task.classes), len(task.groups), len(task.excluded)


def test_what_somebody_else_wrote_is_not_written_over(visit, serve, drawn):
    server = serve(drawn)
    page = visit(server.address, expected=["409 (Conflict)"])
    page.wait_for_selector("#saved:has-text('up to date')")
    press(page, "g")
    typed(page, "mine")
    saved(page)
    for answer, left in [("Take their version", "theirs"), ("Write mine over it", "mine")]:
        write(server.path, f"# before {answer}\ngroups: {{theirs: {{ring: ring}}}}\n")
        press(page, "g")
        typed(page, "mine")
        page.wait_for_selector("#alarm:has-text('was changed elsewhere')")
        assert "theirs" in server.path.read_text()
        assert page.locator("#saved").inner_text() == "not saved"
        page.get_by_role("button", name=answer).click()
        page.wait_for_selector("#alarm p", state="detached")
        if answer == "Write mine over it":
            saved(page)
        text = server.path.read_text()
        assert text.startswith(f"# before {answer}\n")
        assert left in text
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    write(server.path, "groups: {later: {ring: ring}}\n")
    page.evaluate("window.dispatchEvent(new Event('focus'))")
    page.wait_for_selector("#groups li:has-text('later')")
    press(page, "z")
    saved(page)
    assert "later" not in server.path.read_text()


def test_a_server_that_has_ended_is_told(visit, serve, drawn):
    server = serve(drawn)
    page = visit(server.address, expected=["ERR_CONNECTION"])
    page.wait_for_selector("#saved:has-text('up to date')")
    server.shutdown()
    server.server_close()
    press(page, "s")
    page.wait_for_selector("#alarm:has-text('is vitcut label still running?')")


def test_a_label_file_that_is_read_and_saved_stays_as_it_is(visit_file, tmp_path):
    for own in load_task("animals").class_ids:
        (tmp_path / "photos" / own).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / own / "0.png")
    page = visit_file(tmp_path / "photos", no_pictures=True)
    text = ANIMALS.read_text(encoding="utf-8")
    (tmp_path / "theirs.yaml").write_text(text, encoding="utf-8")
    page.set_input_files("#file", tmp_path / "theirs.yaml")
    page.wait_for_selector("#progress:has-text('58 of 58 classes decided')")
    assert page.locator("#groups li strong").all_inner_texts()[:2] == ["aquatic", "reptiles"]
    assert saved_by(page, tmp_path).read_text(encoding="utf-8") == re.sub(r" +#", " #", text)
    (tmp_path / "theirs.yaml").write_text("groups: {a: {unicorn: x}}")
    page.set_input_files("#file", tmp_path / "theirs.yaml")
    page.wait_for_selector(
        "#said:has-text('names 1 classes that the images lack, such as unicorn')"
    )


def test_text_from_outside_is_shown_as_text(visit_file, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    for own in (name, "b"):
        (tmp_path / name / own).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / own / "0.png")
    (tmp_path / "new.yaml").write_text(f"groups: {{'{name}': {{'{name}': '{name}'}}}}\n")
    page = visit_file(tmp_path / name, no_pictures=True)
    page.locator("#classes button").first.click()
    assert page.locator("img").count() == 0
    assert page.locator("main").inner_text().count(name) >= 6
    press(page, "g")
    assert page.locator("dialog li").first.inner_text() == name
    press(page, "Escape", "?")
    assert "undo" in page.locator("dialog").inner_text()
