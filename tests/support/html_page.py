"""Parsing of pages, with the rules that every page must follow."""

from __future__ import annotations

from html.parser import HTMLParser

from starlette.testclient import TestClient

from serve.pages.renderer import HEADERS


class HtmlPage(HTMLParser):
    """The elements of a page and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements with this tag."""
        return [attributes for name, attributes in self.tags if name == tag]


def get_page(client: TestClient, path: str, status: int = 200) -> HtmlPage:
    """Request a page, check its headers and content, and return it."""
    response = client.get(path, headers={"accept": "text/html"})
    assert response.status_code == status, (path, response.text)
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    return parse_page(response.text)


def parse_page(text: str) -> HtmlPage:
    """Parse a page and check that it has nothing inline, labels for all inputs, and unique ids."""
    page = HtmlPage()
    page.feed(text)
    for tag, attributes in page.tags:
        assert tag != "style"
        assert not any(name == "style" or name.startswith("on") for name in attributes), (tag, attributes)
        assert tag != "script" or attributes.get("src")
        assert tag != "img" or "alt" in attributes
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), ids
    labelled = {label.get("for") for label in page.all("label")}
    inputs = [attributes for tag in ("input", "select") for attributes in page.all(tag)]
    assert all(attributes.get("type") == "hidden" or attributes["id"] in labelled for attributes in inputs)
    for _, attributes in page.tags:
        for reference in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(reference) is None or attributes[reference] in ids
    assert len(page.all("main")) == len(page.all("h1")) == 1
    assert page.all("html") == [{"lang": "en"}]
    return page
