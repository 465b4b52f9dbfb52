"""All pages, rendered on the server from the answers of the API, with the same keys and scopes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from lakehouse.iceberg.catalog import Lake
from lakehouse.project import Project
from serve.api.customers import LIMIT, Customers
from serve.api.fraud import Fraud
from serve.api.inventory import Inventory
from serve.api.parameters import read_id, read_moment
from serve.http.bounded_pool import BoundedThreadPool
from serve.http.endpoints import ApiRequest, Endpoint, Parameter
from serve.http.keys import Keys, KeyScope
from serve.http.problems import Problem
from serve.pages.assets import load_assets
from serve.pages.customer_pages import CustomerPages
from serve.pages.forms import optional
from serve.pages.fraud_page import FraudPage
from serve.pages.freshness_page import FreshnessPage
from serve.pages.renderer import HEADERS, Renderer
from serve.pages.sign_in import SignIn
from serve.pages.stock_page import StockPage
from serve.pages.table_frames import TableFrames

Handler = Callable[[ApiRequest], Awaitable[Response]]
STOCK_PARAMETERS = (
    Parameter("product_id", "This product in all stores.", optional(read_id)),
    Parameter("store_id", "Only this store.", optional(read_id)),
    Parameter("as_of", "Stock at this moment (UTC).", optional(read_moment)),
)


class Site:
    """The pages and their routes."""

    def __init__(
        self,
        *,
        lake: Lake,
        project: Project,
        customers: Customers,
        inventory: Inventory,
        fraud: Fraud,
        lookup_pool: BoundedThreadPool,
        status_pool: BoundedThreadPool,
        keys: Keys,
    ) -> None:
        assets = load_assets()
        self._assets = {asset.path: asset for asset in assets.values()}
        self.renderer = Renderer(assets, customers.currency, keys)
        frames = TableFrames(customers.tables)
        self.customers = CustomerPages(customers, frames, self.renderer)
        self.stock = StockPage(inventory, frames, self.renderer)
        self.fraud = FraudPage(fraud=fraud, customers=customers, pool=lookup_pool, keys=keys, renderer=self.renderer)
        self.freshness = FreshnessPage(lake=lake, project=project, inventory=inventory, pool=status_pool, renderer=self.renderer)
        self.session = SignIn(keys, self.renderer)

    def problem(self, request: Request, problem: Problem) -> Response:
        """Return a page about a problem."""
        return self.renderer.problem(request, problem)

    async def static(self, request: ApiRequest) -> Response:
        """Return a static file."""
        asset = self._assets.get(f"/static/{request.path['name']}")
        if asset is None:
            raise Problem(404, "There is no such file.")
        headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
        return Response(asset.content, 200, headers, asset.media_type)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The routes of the pages, which /openapi.json does not list."""
        return (
            self._endpoint("GET", "/", self.customers.overview, scope="customers"),
            self._endpoint("POST", "/customers", self.customers.search, scope="customers"),
            self._endpoint("GET", "/customers/{master_user_id}", self.customers.customer, scope="customers", parameters=(LIMIT,)),
            self._endpoint("GET", "/orders/{order_id}", self.customers.of_order, scope="customers"),
            self._endpoint("GET", "/stock", self.stock.stock, scope="inventory", parameters=STOCK_PARAMETERS),
            self._endpoint("GET", "/fraud", self.fraud.queue, scope="score"),
            self._endpoint("GET", "/freshness", self.freshness.freshness, any_key=True),
            self._endpoint("POST", "/sign-in", self.session.sign_in),
            self._endpoint("POST", "/sign-out", self.session.sign_out),
            self._endpoint("GET", "/static/{name}", self.static),
        )

    def _endpoint(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        scope: KeyScope | None = None,
        parameters: tuple[Parameter, ...] = (),
        any_key: bool = False,
    ) -> Endpoint:
        return Endpoint(
            method=method,
            path=path,
            name=f"page_{handler.__name__}",
            doc=(handler.__doc__ or "").strip(),
            handler=handler,
            answer=str,
            scope=scope,
            parameters=parameters,
            media_type="text/html",
            any_key=any_key,
            cookie_auth=True,
            problem=self.problem,
        )
