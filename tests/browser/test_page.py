"""The page in a real Chromium, over a made-up cluster: it loads, draws, streams and acts, with and without a mouse."""

from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from raymoe.observe.stats import SettingsStats
from tests.browser.conftest import Opened
from tests.browser.scene import Scene

pytestmark = pytest.mark.browser

Open = Callable[..., Opened]
LIVE = "document.querySelector('#live').dataset.state === 'live' && document.querySelectorAll('.device').length > 0"


def brightness(opened: Opened) -> float:
    """Of the page's ground, from 0 to 255."""
    colour: str = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(float(part) for part in colour.strip("rgb()").split(",")) / 3


def test_it_loads_without_complaints_and_asks_nobody_but_its_server(open_page: Open) -> None:
    opened = open_page()
    opened.wait(LIVE)
    opened.wait("performance.getEntriesByName('raymoe-timeline').length > 0")
    assert opened.complaints == []
    assert {urlsplit(url).netloc for url in opened.requests} == {urlsplit(opened.url).netloc}
    assert "tiny-moe" in opened.text("#about") and "importance" in opened.text("#about")
    assert opened.page.title().startswith("tiny-moe")


def test_the_map_has_a_card_per_device_with_budget_link_and_health(open_page: Open) -> None:
    opened = open_page(Scene(devices=3))
    opened.wait("document.querySelectorAll('.device .map').length === 3")
    opened.wait("document.querySelector('.device .meter.link b').textContent.includes('/s')")
    assert opened.pixels(".device .map") > 10, "cold and hot cells"
    assert "owned experts can be computed now" in opened.text(".device .readout")
    assert opened.page.locator(".device[data-state=down]").count() == 1
    assert opened.text(".device[data-state=down] .state") == "does not answer"
    label = opened.page.get_attribute(".device .map", "aria-label") or ""
    assert "8 layers by 32 experts" in label


def test_charts_say_what_the_last_look_brought(open_page: Open) -> None:
    opened = open_page()
    opened.wait("document.querySelector('[data-chart=tpot] output').textContent.endsWith('ms')")
    assert opened.text("[data-chart=hits] output").endswith("%")
    assert opened.text("[data-chart=substituted] output").endswith("%")
    assert opened.pixels("[data-chart=tpot] canvas") > 3
    assert "ms" in (opened.page.get_attribute("[data-chart=tpot] canvas", "aria-label") or "")


def test_a_prompt_streams_and_says_what_it_cost(open_page: Open) -> None:
    opened = open_page()
    opened.wait(LIVE)
    opened.page.check("input[name=quality][value=exact]")
    opened.page.fill("#max-tokens", "20")
    opened.page.click("#send")
    opened.wait("document.querySelector('#answer').dataset.state === 'streaming'")
    opened.wait("document.querySelector('#answer').dataset.state === 'done'")
    assert "a single man in possession of a good fortune" in opened.text("#answer")
    cost = opened.text("#cost")
    assert "89.5%" in cost and "61" in cost and "44" in cost and "5.7 MiB" in cost
    asked = opened.scene.asked[-1]
    assert asked["params"].quality == "exact" and asked["params"].max_tokens == 20


def test_a_chat_message_is_sent_as_one(open_page: Open) -> None:
    opened = open_page()
    opened.page.check("input[name=kind][value=chat]")
    opened.page.fill("#prompt-text", "Who are you?")
    opened.page.click("#send")
    opened.wait("document.querySelector('#answer').dataset.state === 'done'")
    asked = opened.scene.asked[-1]["prompt"]
    assert getattr(asked, "messages", asked) == [{"role": "user", "content": "Who are you?"}]


def test_an_error_is_told_where_the_answer_would_be(open_page: Open) -> None:
    opened = open_page()
    opened.wait(LIVE)
    opened.scene.is_broken = True
    opened.page.click("#send")
    opened.wait("document.querySelector('#answer').dataset.state === 'failed'")
    assert opened.text("#answer") == "the play is over"
    opened.wait("!document.querySelector('#banner').hidden")
    assert "the play is over" in opened.text("#banner")
    opened.scene.is_broken = False
    opened.wait("document.querySelector('#banner').hidden")


def test_sliders_act_with_a_key_and_ask_for_one_without(open_page: Open) -> None:
    opened = open_page()
    opened.wait("!document.querySelector('#alpha').disabled")
    slide = """(value) => {
        const slider = document.querySelector('#alpha');
        slider.value = value;
        slider.dispatchEvent(new Event('input'));
    }"""
    opened.page.evaluate(slide, "0.4")
    opened.wait("document.querySelector('#key-dialog').open")
    assert opened.scene.settings.alpha == 0.25
    opened.page.fill("#key", "secret")
    opened.page.keyboard.press("Enter")
    opened.wait("!document.querySelector('#key-dialog').open")
    opened.page.evaluate(slide, "0.4")
    opened.wait("document.querySelector('#settings-note').textContent === 'in force'")
    assert opened.scene.settings.alpha == 0.4
    opened.page.evaluate(slide.replace("#alpha", "#alpha-max"), "0.2")
    opened.wait("document.querySelector('#alpha-value').textContent === '0.20'")
    opened.wait("document.querySelector('#settings-note').textContent === 'in force'")
    assert (opened.scene.settings.alpha, opened.scene.settings.alpha_max) == (0.2, 0.2), "alpha stays within its limit"


def test_sliders_rest_where_nothing_is_ever_substituted(open_page: Open) -> None:
    scene = Scene()
    scene.settings = SettingsStats(policy="on_demand", substitutes=False, alpha=0.25, alpha_max=0.5)
    opened = open_page(scene)
    opened.wait("!document.querySelector('#settings-why').hidden")
    assert "never substitutes" in opened.text("#settings-why")
    assert opened.page.is_disabled("#alpha") and opened.page.is_disabled("#alpha-max")


def test_everything_can_be_reached_and_done_by_keyboard(open_page: Open) -> None:
    opened = open_page()
    opened.wait(LIVE)
    opened.wait("!document.querySelector('#timeline').hidden")
    reached = set()
    for _ in range(40):
        opened.page.keyboard.press("Tab")
        reached.add(
            opened.page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
    wanted = {"skip", "key-open", "theme", "prompt-text", "quality", "max-tokens", "send", "alpha", "map", "timeline"}
    assert wanted <= reached
    opened.page.focus("#prompt-text")
    opened.page.keyboard.press("Control+Enter")
    opened.wait("document.querySelector('#answer').dataset.state === 'done'")
    opened.page.focus(".device .map")
    opened.page.keyboard.press("ArrowDown")
    opened.page.keyboard.press("ArrowRight")
    assert opened.text(".device .readout").startswith("Layer 1, expert 1:")
    opened.page.focus("#timeline-hold")
    opened.page.keyboard.press("Space")
    opened.page.focus("#timeline")
    opened.page.keyboard.press("ArrowRight")
    assert opened.text("#timeline-readout").startswith("main: trunk, layer 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_and_the_switch(open_page: Open, scheme: str) -> None:
    opened = open_page(color_scheme=scheme)
    opened.wait(LIVE)
    assert (brightness(opened) < 60) == (scheme == "dark")
    other = "light" if scheme == "dark" else "dark"
    before = opened.pixels(".device .map")
    opened.page.check(f"input[name=theme][value={other}]")
    assert (brightness(opened) < 60) == (other == "dark")
    assert before > 3 and opened.pixels(".device .map") > 3
    opened.page.reload()
    opened.wait(LIVE)
    assert (brightness(opened) < 60) == (other == "dark"), "the choice is kept"


@pytest.mark.parametrize("width", [360, 768, 1024, 1920])
def test_nothing_is_cut_off_at_any_width(open_page: Open, width: int) -> None:
    opened = open_page(Scene(devices=3), viewport={"width": width, "height": 900})
    opened.wait(LIVE)
    opened.page.click("#send")
    opened.wait("document.querySelector('#cost').children.length > 0")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_94_layers_of_256_experts_draw_without_an_element_per_cell(open_page: Open) -> None:
    opened = open_page(Scene(layers=94, experts=256, devices=3))
    opened.wait("performance.getEntriesByName('raymoe-heatmap').length >= 6")
    assert opened.page.evaluate("document.querySelectorAll('*').length") < 500
    cells = opened.page.evaluate("performance.getEntriesByName('raymoe-heatmap')[0].detail.cells")
    assert cells == 94 * 256
    durations = sorted(opened.durations_ms("raymoe-heatmap"))
    print(f"94 x 256 cells: median {durations[len(durations) // 2]:.2f} ms, slowest {durations[-1]:.2f} ms")
    assert opened.pixels(".device .map") > 10


def test_a_hidden_page_asks_for_nothing(open_page: Open) -> None:
    opened = open_page()
    opened.wait(LIVE)
    opened.page.evaluate(
        "() => { Object.defineProperty(document, 'visibilityState', { value: 'hidden', configurable: true }); }"
    )
    opened.wait("document.querySelector('#live').textContent === 'Paused'")
    asked = len(opened.requests)
    opened.page.wait_for_timeout(2500)
    assert len(opened.requests) == asked


def test_the_page_may_load_nothing_from_elsewhere_and_run_no_inline_script(open_page: Open) -> None:
    opened = open_page()
    answer = opened.page.request.get(opened.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    again = opened.page.request.get(opened.url, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status == 304
    assert opened.page.request.get(f"{opened.url}/page/..%2fapi.py").status == 404
