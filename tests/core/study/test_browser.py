"""The page in a real browser: a whole study with keys and with taps, reload, back, two people, a lost connection."""

import re
import shutil

import pytest
from study_cases import listening, make_study

from hgdpo_core.study.votes import read_votes

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to drive")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
READY = "#left:enabled"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("study") / "root")


@pytest.fixture
def opened(root, tmp_path, request):
    """Address and session of a study of 12 questions."""
    study = make_study(root, repeats=0, checks=0, seed=sum(request.node.name.encode()))
    with listening(study, tmp_path / "images") as served:
        yield served


@pytest.fixture
def visit(browser):
    """Opens the page as a new visitor; fails on anything that the console or the network complains about."""
    contexts, problems = [], []

    def open_page(url, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(url) else problems.append(asked.url))
        page.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text
                else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def start(page):
    page.click("#start")
    page.wait_for_selector(READY)


def wait_for(page, number, total=12):
    """Until a question, counted from 1, can be answered."""
    playwright.expect(page.locator("#count")).to_have_text(f"{number} of {total}", timeout=15_000)
    page.wait_for_selector(READY)
    page.wait_for_timeout(280)  # the page takes no answer that fast after the images


def choices(session):
    session.move()
    return read_votes(session.study.store, session.study.id)["choice"].to_pylist()


def test_twelve_questions_with_keys_a_reload_and_a_correction(opened, visit):
    url, session = opened
    page = visit(url)
    assert "12" in page.inner_text(".facts") and page.is_visible("text=What is stored")
    start(page)
    keys = ["1", "2", "0", "ArrowLeft", "ArrowRight", "ArrowDown", "1", "2", "0", "1", "2", "0"]
    for number, key in enumerate(keys, 1):
        wait_for(page, number)
        if number == 5:
            page.reload()
            wait_for(page, number)
        if number == 8:
            page.keyboard.press("Backspace")
            page.wait_for_selector("#left[aria-pressed=true]")
            wait_for(page, 7)
            page.keyboard.press("2")
            wait_for(page, number)
        page.keyboard.press(key)
    page.wait_for_selector("#end:visible")
    expected = ["left", "right", "tie"] * 4
    expected[6:7], expected[9:12] = ["right"], ["left", "right", "tie"]
    assert choices(session) == expected


def test_twelve_questions_with_taps_on_a_phone(opened, visit):
    url, session = opened
    page = visit(url, **PHONE)
    start(page)
    for number in range(1, 13):
        wait_for(page, number)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && "
                             "document.documentElement.scrollHeight <= innerHeight"), "all of it is seen at once"
        upper, lower = (page.locator(f"#{side}-frame").bounding_box() for side in ("left", "right"))
        assert upper["y"] + upper["height"] < lower["y"] and upper["width"] > 200
        page.tap(("#left", "#tie", "#right-frame")[number % 3])
    page.wait_for_selector("#end:visible")
    assert choices(session) == ["tie", "right", "left"] * 4


def test_two_people_at_once(opened, visit):
    url, session = opened
    one, two = visit(url), visit(url, color_scheme="dark")
    for page in (one, two):
        start(page)
    for number in range(1, 4):
        for page, key in ((one, "1"), (two, "2")):
            wait_for(page, number)
            page.keyboard.press(key)
    for page in (one, two):
        wait_for(page, 4)
    session.move()
    votes = read_votes(session.study.store, session.study.id).to_pylist()
    by_person = {}
    for vote in votes:
        by_person.setdefault(vote["participant"], []).append(vote["choice"])
    assert sorted(by_person.values()) == [["left"] * 3, ["right"] * 3]


def test_a_lost_connection_loses_and_doubles_nothing(opened, visit):
    """The first try never arrives; of the second the reply is lost; the third is a repeat."""
    url, session = opened
    page, tries = visit(url), []
    start(page)

    def fail(route):
        tries.append(route.request.post_data)
        if len(tries) == 1:
            return route.abort()
        if len(tries) == 2:
            route.fetch()
            return route.abort()
        return route.continue_()

    page.route(re.compile("api/answer"), fail)
    wait_for(page, 1)
    page.keyboard.press("1")
    page.keyboard.press("2")
    playwright.expect(page.locator("#status")).to_contain_text("No connection")
    assert page.inner_text("#count") == "1 of 12", "the next question waits for the acknowledgement"
    wait_for(page, 2)
    assert len(tries) == 3 and len(set(tries)) == 1 and choices(session) == ["left"]


def test_a_double_click_and_two_tabs_answer_once(opened, visit):
    url, session = opened
    page = visit(url)
    start(page)
    wait_for(page, 1)
    tab = page.context.new_page()
    tab.goto(url)
    wait_for(tab, 1)
    page.dblclick("#right")
    wait_for(page, 2)
    tab.keyboard.press("1")
    wait_for(tab, 2)
    assert choices(session) == ["right"]


def test_another_browser_goes_on_by_the_link_and_answers_can_be_deleted(opened, visit):
    url, session = opened
    page = visit(url)
    start(page)
    wait_for(page, 1)
    page.keyboard.press("1")
    wait_for(page, 2)
    page.click("#more")
    link = page.input_value("#link")
    other = visit(url, **PHONE)
    other.goto(link)
    other.reload()  # only what follows # was new
    wait_for(other, 2)
    assert other.url == url
    other.tap("#more")
    other.tap("#withdraw")
    assert choices(session) == ["left"]
    other.tap("#withdraw")
    other.wait_for_selector("#welcome:visible")
    assert choices(session) == []


@pytest.mark.parametrize("size", [(320, 568), (844, 390), (1280, 800), (3840, 2160)])
def test_images_are_large_and_nothing_is_cut_off(opened, visit, size):
    page = visit(opened[0], viewport={"width": size[0], "height": size[1]})
    start(page)
    wait_for(page, 1)
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("left-frame", "right-frame", "left", "right", "back")]
    assert all(box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= size[0]
               and box["y"] + box["height"] <= size[1] for box in boxes)
    left, right = boxes[:2]
    assert abs(left["width"] - right["width"]) < 1 and abs(left["width"] / left["height"] - 24 / 16) < 0.02
    used = 2 * left["width"] * left["height"] / (size[0] * size[1])
    assert used > 0.33, "both images take much of the page"


def test_a_screen_reader_gets_the_question_and_the_answers(opened, visit):
    page = visit(opened[0])
    start(page)
    wait_for(page, 1)
    for name in ("Left", "Cannot tell", "Right"):
        assert page.get_by_role("button", name=name, exact=True).is_enabled()
    assert page.get_by_role("heading", name="Which image looks more natural?").is_visible()
    assert page.get_by_role("img", name="Left image").is_visible()
    assert page.get_by_role("progressbar", name="Questions answered").is_visible()
    assert page.inner_text("#spoken").startswith("Question 1 of 12. a woman in a red top")
    page.focus("#tie")
    page.keyboard.press("Enter")
    wait_for(page, 2)
