"""What PERDURE_QUEUES takes, and what it says of what it does not take."""

from __future__ import annotations

import pytest
from perdure_service.domain.queues import QueueLimits, Queues
from perdure_service.errors import ConfigurationError
from perdure_service.settings import effective, load_settings


def test_queues_are_read_from_json(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"mail": {"rate_limit": 100, "rate_period": 60}, "gpu": {"worker_concurrency": 1, "global_concurrency": 4}}'
    monkeypatch.setenv("PERDURE_QUEUES", text)
    settings = load_settings()
    gpu, mail, default = Queues.of_settings(settings.queues).limits
    assert gpu == QueueLimits("gpu", worker_concurrency=1, global_concurrency=4)
    assert mail == QueueLimits("mail", rate_limit=100, rate_period_s=60)
    assert default == QueueLimits("perdure")
    assert (gpu.shared, mail.shared, default.shared) == (True, True, False)
    (line,) = [line for line in effective(settings) if line.startswith("PERDURE_QUEUES =")]
    assert '"mail": {"rate_limit": 100, "rate_period": "PT1M"}' in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "PERDURE_QUEUES: is not JSON"),
        ("[]", "must be a JSON object of names and limits"),
        ('{"Mail": {}}', "'Mail' cannot be a queue's name"),
        ('{"_dbos_internal_queue": {}}', "cannot be a queue's name"),
        ('{"mail": {"global_concurrency": 0}}', "PERDURE_QUEUES__MAIL__GLOBAL_CONCURRENCY: .* greater than"),
        ('{"mail": {"concurrency": 4}}', "PERDURE_QUEUES__MAIL__CONCURRENCY: Extra inputs"),
        ('{"mail": {"rate_limit": 4}}', "rate_limit and rate_period belong together"),
        ('{"mail": {"rate_limit": 4, "rate_period": 0}}', "RATE_PERIOD: .* greater than"),
        ('{"mail": {"worker_concurrency": 4, "global_concurrency": 3}}', "must not be above global_concurrency"),
    ],
)
def test_what_is_wrong_with_queues_is_said(monkeypatch: pytest.MonkeyPatch, text: str, complaint: str) -> None:
    monkeypatch.setenv("PERDURE_QUEUES", text)
    with pytest.raises(ConfigurationError, match=complaint):
        load_settings()
