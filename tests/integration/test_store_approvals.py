"""Pages of approvals, on every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from perdure_service.domain.approvals import ApprovalState, TimeoutOutcome
from perdure_service.domain.runs import RunKey
from perdure_service.store import approvals
from perdure_service.store.engine import create_engine
from perdure_service.store.runs import MAX_PAGE_CHARS


@pytest.fixture(scope="module")
def engine(dialect_url: str) -> Iterator[sa.Engine]:
    engine = create_engine(dialect_url, pool_size=5, statement_timeout=timedelta(seconds=10))
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("payload_chars", "page_size", "lengths"),
    [(10, 3, [3, 3, 1]), (10, 7, [7]), (MAX_PAGE_CHARS // 2, 1_000, [2, 2, 2, 1]), (MAX_PAGE_CHARS, 2, [1] * 7)],
)
def test_a_page_of_approvals_is_bounded_in_number_and_size(
    engine: sa.Engine, payload_chars: int, page_size: int, lengths: list[int]
) -> None:
    namespace = f"{engine.dialect.name[:4]}-{engine.dialect.driver[-1]}-{payload_chars}-{page_size}"
    key = RunKey.of_api(namespace, "asker")
    with engine.begin() as conn:
        for step_id in range(1, 8):
            payload = f'"{"x" * (payload_chars - 2)}"'
            approvals.ask(
                conn, approvals.Question(key, "a", step_id, "", payload, "", ["ann"], None, TimeoutOutcome.REJECT)
            )
    pages, token = [], ""
    while not pages or token:
        with engine.begin() as conn:
            page, token = approvals.list_page(
                conn, namespace, states=frozenset({ApprovalState.PENDING}), run_id="", page_size=page_size,
                page_token=token,
            )  # fmt: skip
        pages.append([one.step_id for one in page])
    assert [len(page) for page in pages] == lengths
    assert [step_id for page in pages for step_id in page] == list(range(1, 8))
