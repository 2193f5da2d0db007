"""What a killed or stopped engine leaves in a test's process: no connection that nobody closes."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from perdure_service.durable.crash import EngineDied, dispose_for_good
from sqlalchemy.pool import QueuePool


def test_who_comes_late_gets_no_connection_and_what_is_given_back_late_is_closed() -> None:
    engine = sa.create_engine("sqlite://", poolclass=QueuePool)
    late = engine.connect()
    connection = late.connection.driver_connection
    assert connection is not None
    dispose_for_good(engine)
    with pytest.raises(EngineDied):
        engine.connect()
    late.exec_driver_sql("SELECT 1")
    late.close()
    with pytest.raises(Exception, match="closed"):
        connection.execute("SELECT 1")
