"""Flower's pages, as somebody reads them in a browser who knows the password."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from playwright.sync_api import Browser, Page
from playwright.sync_api import Error as PlaywrightError

from tests.waiting import wait_until

USER = "vmherd"
_LOOK_EVERY_S = 0.5
_ROWS = "rows => rows.map(row => [...row.querySelectorAll('td')].map(cell => cell.textContent.trim()))"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of Flower's list of tasks."""

    name: str
    state: str
    args: str
    worker: str


@contextmanager
def reading(browser: Browser, url: str, password: str) -> Iterator[Page]:
    """Give a page on Flower, once it answers."""
    context = browser.new_context(
        base_url=url,
        http_credentials={"username": USER, "password": password},
        viewport={"width": 1440, "height": 900},
    )
    page = context.new_page()

    def is_up() -> bool:
        try:
            return page.request.get("/healthcheck").ok
        except PlaywrightError as error:
            if "ECONNREFUSED" not in error.message:
                raise
            return False

    wait_until(is_up, 60, "Flower answers", interval=_LOOK_EVERY_S)
    try:
        yield page
    finally:
        context.close()


def rows(page: Page, table: str) -> list[list[str]]:
    """Give the cells of a table's body, row by row."""
    found: list[list[str]] = page.eval_on_selector_all(f"{table} tbody tr", _ROWS)
    return found


def tasks(page: Page, name: str = "") -> list[Row]:
    """The first page of Flower's list as it is now (of the tasks of one name), by the names of its columns."""
    with page.expect_response("**/tasks/datatable") as answer:
        page.goto(f"/tasks?name={name}" if name else "/tasks")
    assert answer.value.ok
    page.wait_for_selector("#tasks-table tbody tr td")
    columns = page.eval_on_selector_all("#tasks-table thead th", "cells => cells.map(cell => cell.dataset.column)")
    found = [dict(zip(columns, row, strict=True)) for row in rows(page, "#tasks-table") if len(row) == len(columns)]
    return [Row(one["name"], one["state"], one["args"], one["worker"]) for one in found]


def lengths(page: Page) -> dict[str, int]:
    """Flower's list of queues."""
    page.goto("/broker")
    return {row[0]: int(row[1]) for row in rows(page, "#queue-table")}
