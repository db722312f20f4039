"""The report in a real browser: Debian's chromium and chromium-driver, or Google's Chrome with its driver."""

import dataclasses
import json
import re
import shutil
import tempfile

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from rlens_jax.plans import Plan
from rlens_jax.reporting.plots import plot_candidates, plot_curves
from rlens_jax.reporting.report_page import report_html
from rlens_jax.reporting.run_files import Answer, read_run, write_examples
from tests.reporting.runs import HOSTILE, examples, hostile_results, write_run
from tests.reporting.synthetic import synthetic_results

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PHONE, DESKTOP = (390, 844), (1280, 900)
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def find(what, *names):
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.fail(f"these tests need {what}: apt-get install chromium chromium-driver", pytrace=False)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files of a report of one run, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    results = synthetic_results(samples=20)
    first = read_run(write_run(folder / "first", results, kept=examples()))
    second = read_run(write_run(folder / "a-second-run-with-quite-a-long-name", synthetic_results(28, 20, operators=("ffn",))))
    paths = {}
    for name, runs in (("one", [first]), ("two", [first, second])):
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(report_html(runs))
    return paths | hostile_pages(folder)


def hostile_pages(folder):
    """A report and plots of a run in which every text that comes from data tries to become markup."""
    results, evil = hostile_results(), Answer(HOSTILE, 0.5)
    texts = {"id": HOSTILE, "dataset": HOSTILE, "question": HOSTILE, "references": (HOSTILE,), "dense": evil, "reduced": evil}
    kept = [dataclasses.replace(examples(1)[0], **texts)]
    run = write_run(folder / "</title><script>document.title='owned'<".replace("/", "\N{DIVISION SLASH}"), results)
    write_examples(run, kept, plan=Plan((10,)), model_hash=results.model_hash, data_hash=results.data_hash)
    page = folder / "hostile.html"
    page.write_text(report_html([read_run(run)]))
    paths = {"hostile": page, "curves": folder / "curves.svg", "candidates": folder / "candidates.svg"}
    paths["curves"].write_bytes(plot_curves(results, "svg"))
    paths["candidates"].write_bytes(plot_candidates(results, "svg"))
    return paths


@pytest.fixture(scope="module")
def driver():
    options = Options()
    options.binary_location = find("a browser", "chromium", "chromium-browser", "google-chrome")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        driver = Chrome(options=options, service=Service(find("its driver", "chromedriver")))
        yield driver
        driver.quit()


@pytest.fixture
def show(driver, pages):
    """Opens a page with a size and theme; afterwards checks that it made no network request and logged nothing."""

    def open_page(name, size, theme="light"):
        width, height = size
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE},
        )
        media(driver, theme)
        driver.get(pages[name].as_uri())
        return driver

    for kind in ("browser", "performance"):
        driver.get_log(kind)
    yield open_page
    assert driver.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert requests  # the log exists
    assert {url for url in requests if not url.startswith("data:")} <= {path.as_uri() for path in pages.values()}


def media(driver, theme, kind=""):
    features = [{"name": "prefers-color-scheme", "value": theme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})


def lightness(driver, selector, style):
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return sum(map(int, re.findall(r"\d+", driver.execute_script(script, selector, style))[:3])) / 765


def shown_tip(holder):
    (tip,) = (tip for tip in holder.find_elements(By.CLASS_NAME, "tip") if tip.is_displayed())
    return tip


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["one", "two"])
def test_nothing_is_wider_than_the_window(show, size, name):
    driver = show(name, size)
    driver.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    assert driver.execute_script("return innerWidth") == size[0]
    assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
    beyond = """
      const inside = (element) => element.getBoundingClientRect().right <= innerWidth + 0.5;
      return [...document.body.querySelectorAll("*")]
        .filter((element) => !element.closest(".scroll *") && !element.closest("svg *") && !inside(element))
        .map((element) => element.outerHTML.slice(0, 80))"""
    assert driver.execute_script(beyond) == []
    assert driver.title.startswith("Which layers waste visual computation")  # no question's script ran


def test_nothing_of_the_data_becomes_markup(show):
    driver = show("hostile", DESKTOP)
    driver.execute_script("document.querySelectorAll('details').forEach((details) => { details.open = true })")
    assert driver.title.startswith("Which layers waste visual computation")
    count = "return [...document.querySelectorAll(arguments[0])].length"
    assert driver.execute_script(count, "img") == driver.execute_script(count, "img[src^='data:']") == 1
    tags = "return [...new Set([...document.querySelectorAll('*')].map((element) => element.tagName.toLowerCase()))].sort()"
    hostile = driver.execute_script(tags)
    text = driver.execute_script("return document.body.textContent")
    assert " ".join(text.split()).count(" ".join(HOSTILE.split())) > 10
    show("one", DESKTOP)
    assert set(hostile) <= set(driver.execute_script(tags))
    for name in ("curves", "candidates"):
        show(name, DESKTOP)
        assert driver.execute_script("return document.documentElement.tagName") == "svg"
        assert driver.execute_script(count, "script, img, foreignObject, [onload], [onerror]") == 0


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_curves_tell_their_values_to_pointer_finger_and_keyboard(show, pages, size):
    driver = show("one", size)
    points = json.loads((pages["one"].parent / "first" / "ranking.json").read_text())
    points = points["held_out"]["attention"]["curves"]["searched"]["points"]
    plot = driver.find_element(By.CLASS_NAME, "plot")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", plot)
    middle = {"x": box["x"] + box["width"] * (40 + 388 / 2) / 440, "y": box["y"] + box["height"] / 2}
    if size == PHONE:
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [middle]})
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    else:
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **middle})
    assert "6 of 12 layers reduced" in shown_tip(plot).text
    assert f"{100 * points[6]['mean']:.1f} % searched" in shown_tip(plot).text
    plot.send_keys(Keys.ARROW_RIGHT)
    assert "7 of 12 layers reduced" in shown_tip(plot).text
    assert f"{100 * points[7]['mean']:.1f} % searched" in plot.get_attribute("aria-valuetext")
    tip = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", shown_tip(plot))
    assert tip["left"] >= 0 and tip["right"] <= size[0]
    plot.send_keys(Keys.ESCAPE)
    assert not [tip for tip in plot.find_elements(By.CLASS_NAME, "tip") if tip.is_displayed()]


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_heat_maps_tell_the_candidates_to_pointer_and_keyboard(show, size):
    driver = show("one", size)
    figure = driver.find_element(By.XPATH, "//figure[.//table[contains(@class, 'heat')]]")
    cells = figure.find_elements(By.CSS_SELECTOR, "td[data-tip]")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", figure)
    ActionChains(driver).move_to_element(cells[2]).perform()
    assert shown_tip(figure).text == cells[2].get_attribute("data-tip")
    driver.execute_script("arguments[0].focus()", cells[0])
    cells[0].send_keys(Keys.ARROW_RIGHT)
    assert shown_tip(figure).text == cells[1].get_attribute("data-tip")
    assert driver.switch_to.active_element == cells[1]


def test_dark_and_light_by_preference_and_by_button(show):
    driver = show("two", PHONE, "dark")
    page, text = ("body", "backgroundColor"), ("body", "color")
    assert lightness(driver, *page) < 0.15 < 0.8 < lightness(driver, *text)
    lost = lightness(driver, ".order .lost", "backgroundColor")
    button = driver.find_element(By.ID, "theme")
    assert button.text == "Light theme"
    button.click()
    assert lightness(driver, *text) < 0.2 < 0.9 < lightness(driver, *page)
    assert lightness(driver, ".order .lost", "backgroundColor") < lost
    button.click()
    assert lightness(driver, *page) < 0.15
    media(driver, "light")
    assert lightness(driver, *page) < 0.15  # the button wins over the preference
    media(driver, "dark", "print")
    assert lightness(driver, *page) > 0.9  # paper is white
    assert not button.is_displayed()
