"""The fraud page: the review queue, and customers at risk by rules."""

from __future__ import annotations

from collections import Counter

from starlette.responses import Response

from serve.api.customers import Customers
from serve.api.fraud import Fraud
from serve.http.authentication import has_scope
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest
from serve.http.keys import Keys
from serve.pages.renderer import Renderer

MAX_QUEUE = 200
MAX_AT_RISK = 50


class FraudPage:
    """The page about fraud."""

    def __init__(self, *, fraud: Fraud, customers: Customers, pool: BoundedThreadPool, keys: Keys, renderer: Renderer) -> None:
        self.fraud, self.customers, self.pool = fraud, customers, pool
        self.keys, self.renderer = keys, renderer

    async def queue(self, request: ApiRequest) -> Response:
        """Show the review queue and customers at risk."""
        return await self.pool.run(self._queue, request)

    def _queue(self, request: ApiRequest) -> Response:
        scored = self.fraud.answers()
        queue = [(at, score) for at, score in scored if score.decision != "approve"]
        queue.sort(key=lambda entry: (-entry[1].score, entry[0]))
        models = self.fraud.models
        show_customers = has_scope(request.http, "customers", self.keys)
        at_risk, total_at_risk = self.customers.at_risk(MAX_AT_RISK) if show_customers else ([], 0)
        return self.renderer.page(
            request,
            "fraud.html",
            "fraud",
            queue=queue[:MAX_QUEUE],
            queue_length=len(queue),
            scored=len(scored),
            decisions=Counter(score.decision for _, score in scored),
            model=models.registry.name,
            champion=models.current.champion,
            challenger=models.current.challenger,
            registry_error=models.error,
            minutes=self.fraud.serving.same_answer_seconds / 60,
            show_customers=show_customers,
            at_risk=at_risk,
            total_at_risk=total_at_risk,
        )
