"""The stock page: levels of a product, or products with low stock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl
from starlette.responses import Response

from pipelines.gold.dim_products import DIM_PRODUCTS
from pipelines.gold.dim_stores import DIM_STORES, NO_STORE
from serve.api.inventory import Inventory, LowStock, ProductStock
from serve.http.endpoints import ApiRequest
from serve.http.problems import Problem
from serve.pages.renderer import Renderer
from serve.pages.table_frames import TableFrames

MAX_LOW_STOCK = 100
MAX_SUGGESTIONS = 1_000
"""Products suggested while a user types; a larger catalogue gets no suggestions."""


class StockPage:
    """The page about stock."""

    def __init__(self, inventory: Inventory, frames: TableFrames, renderer: Renderer) -> None:
        self.inventory, self.frames, self.renderer = inventory, frames, renderer

    async def stock(self, request: ApiRequest) -> Response:
        """Show the stock of a product, or products with low stock."""
        query = {name: value for name, value in request.query.items() if value}
        product = query.get("product_id")
        product_stock: ProductStock | None = None
        low: LowStock | None = None
        problem = None
        if product:
            try:
                product_stock = await self.inventory.stock_of(product, replace(request, query=query))
            except Problem as error:
                if error.status != 404:
                    raise
                problem = error.detail
        else:
            low = await self.inventory.low(replace(request, query=query | {"limit": MAX_LOW_STOCK}))
        names = await self.inventory.pool.run(self._names)
        return self.renderer.page(
            request,
            "stock.html",
            "stock",
            404 if problem else 200,
            product=product,
            store=query.get("store_id"),
            moment=query.get("as_of"),
            product_stock=product_stock,
            low=low,
            problem=problem,
            low_stock_days=self.inventory.low_stock_days,
            max_suggestions=MAX_SUGGESTIONS,
            **names,
        )

    def _names(self) -> dict[str, Any]:
        stores = self.frames.read(DIM_STORES, ("store_id", "name", "city")).filter(pl.col("store_id") != NO_STORE)
        products = self.frames.read(DIM_PRODUCTS, ("product_id", "name"))
        return {"stores": stores.sort("store_id").to_dicts(), "names": dict(products.iter_rows())}
