"""Pages in a browser: layout, keyboard, and live stock. Needs Chromium and its driver."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
from starlette.testclient import TestClient
from support.page_client import PAGES
from support.scoring_desk import replica
from support.waiting import skip_or_fail

from pipelines.settings import Settings

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@dataclass
class Tab:
    """A tab of a headless Chromium, and the address of a server."""

    driver: Any
    address: str

    def open(self, path: str, width: int = 1280, dark: bool = False) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.address + path)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def wait_until(self, condition: Callable[[], Any], description: str) -> Any:
        deadline = time.monotonic() + 20
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{description}: {self.driver.current_url}"
            time.sleep(0.05)
        return found

    @property
    def console_messages(self) -> list[str]:
        return [one["message"] for one in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def tab(filled: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if CHROMIUM is None or DRIVER is None:
        skip_or_fail("Chromium and its driver are not installed (apt-get install chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with served(filled) as address:
        driver = Chrome(options, ChromeService(DRIVER))
        try:
            yield Tab(driver, address)
        finally:
            driver.quit()


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[str]:
    """Serve the application on a free port."""
    import uvicorn

    application = replica(settings, scores_topic="")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application.asgi(), port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert application.state.ready.wait(60)
    deadline = time.monotonic() + 60
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_pages_fit_the_screen_without_console_messages(tab: Tab, merged_customer: str, width: int, dark: bool) -> None:
    for path in (*PAGES, f"/customers/{merged_customer}"):
        tab.open(path, width, dark)
        assert tab.run("return document.documentElement.scrollWidth") <= width, path
        assert tab.console_messages == [], path
        ground = tab.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
        small = tab.run(
            "return [...document.querySelectorAll('button, input:not([type=hidden]), select, header a')]"
            ".filter(one => one.offsetParent && one.getBoundingClientRect().height < 24).map(one => one.outerHTML)"
        )
        assert small == [], path
        requested = tab.run("return performance.getEntriesByType('resource').map(one => one.name)")
        assert requested
        assert all(name.startswith(tab.address) for name in requested)


@pytest.mark.browser
def test_keyboard_alone_finds_a_customer_by_email(tab: Tab, client: TestClient, merged_customer: str) -> None:
    from selenium.webdriver.common.keys import Keys as Press

    email = client.get(f"/v1/customers/{merged_customer}").json()["profile"]["email"]
    tab.open("/")

    def focused() -> Any:
        return tab.run("const one = document.activeElement; return one.id || one.textContent.trim()")

    tab.press(Press.TAB)
    assert focused() == "Skip to content"
    assert tab.run("return document.activeElement.getBoundingClientRect().left") >= 0
    tab.press(Press.ENTER)
    assert tab.wait_until(lambda: focused() == "main", "the main content has the focus")
    tab.press(Press.TAB)
    assert focused() == "q"
    assert tab.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.press(email.upper(), Press.ENTER)
    tab.wait_until(lambda: tab.driver.current_url.endswith(f"/customers/{merged_customer}"), "the person's page")
    reached = set()
    for _ in range(60):
        tab.press(Press.TAB)
        reached.add(focused())
    # scrollable regions and collapsed details can be focused, so no mouse is needed
    assert "All links with their reasons" in reached
    assert tab.run("return [...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0)")


@pytest.mark.browser
def test_stock_page_updates_live(tab: Tab, filled: Settings) -> None:
    from confluent_kafka import Producer

    tab.open("/stock?product_id=P0001")
    tab.run("window.stays = true")
    store = tab.run("return document.querySelector('#levels tr[data-store]').dataset.store")
    tab.wait_until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "the stream is open")
    producer = Producer({"bootstrap.servers": filled.kafka.bootstrap_servers})

    def count(units: int) -> None:
        event = {
            "event_id": f"page-{units}-{time.time_ns()}",
            "event_type": "stock_counted",
            "timestamp": datetime.now(UTC).isoformat(),
            "metadata": {"product_id": "P0001", "store_id": store, "counted": units, "quantity": units},
        }
        producer.produce("events", json.dumps(event).encode(), key=b"P0001")
        assert producer.flush(10) == 0

    def on_hand() -> str:
        cell = f"#levels tr[data-store='{store}'] [data-field=on_hand]"
        return str(tab.run(f'return document.querySelector("{cell}").textContent'))

    count(4321)
    tab.wait_until(lambda: on_hand() == "4,321", "the new figure in the table")
    assert tab.run("return window.stays") is True
    assert "4,321 on hand" in tab.run("return document.querySelector('#changes li').textContent")
    tab.run("document.getElementById('pause').click()")
    count(17)
    time.sleep(1.0)
    assert on_hand() == "4,321"
    tab.run("document.getElementById('pause').click()")
    tab.wait_until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "it is open again")
    assert tab.console_messages == []


@pytest.mark.browser
def test_product_that_becomes_low_is_added(tab: Tab, client: TestClient, filled: Settings) -> None:
    from confluent_kafka import Producer

    low = {(one["product_id"], one["store_id"]) for one in client.get("/v1/inventory/low-stock").json()["levels"]}
    levels = client.get("/v1/inventory/P0002").json()["stores"]
    store = next(one["store_id"] for one in levels if ("P0002", one["store_id"]) not in low)
    tab.open("/stock")
    tab.wait_until(lambda: tab.run("return document.querySelector('[data-live]').dataset.state") == "live", "the stream is open")
    event = {
        "event_id": f"page-low-{time.time_ns()}",
        "event_type": "stock_counted",
        "timestamp": datetime.now(UTC).isoformat(),
        "metadata": {"product_id": "P0002", "store_id": store, "counted": 0, "quantity": 0},
    }
    producer = Producer({"bootstrap.servers": filled.kafka.bootstrap_servers})
    producer.produce("events", json.dumps(event).encode(), key=b"P0002")
    assert producer.flush(10) == 0
    row = f"#levels tr[data-product='P0002'][data-store='{store}']"
    tab.wait_until(lambda: tab.run(f'return Boolean(document.querySelector("{row}"))'), "the new row")
    assert tab.run(f"return document.querySelector(\"{row}\").querySelector('[data-field=low_stock]').textContent") == "Low"
