"""Run SQL in Spark or DuckDB on an Iceberg REST catalog, in a separate environment, and print the rows as JSON.

python iceberg_engines.py spark|duckdb CATALOG_ADDRESS [STATEMENT ...]
"""

from __future__ import annotations

import json
import site
import sys
from pathlib import Path
from typing import Any

ICEBERG_JAR = next((Path(__file__).resolve().parents[2] / "build" / "iceberg-spark").glob("iceberg-spark-runtime-*.jar"))


def spark_session(address: str) -> Any:
    """Start a local Spark with the catalog as `shop`."""
    from pyspark.sql import SparkSession

    options = {
        "spark.jars": str(ICEBERG_JAR),
        "spark.sql.extensions": "org.apache.iceberg.spark.extensions.IcebergSparkSessionExtensions",
        "spark.sql.catalog.shop": "org.apache.iceberg.spark.SparkCatalog",
        "spark.sql.catalog.shop.type": "rest",
        "spark.sql.catalog.shop.uri": address,
        "spark.sql.defaultCatalog": "shop",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.shuffle.partitions": "2",
        "spark.driver.host": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
    }
    builder = SparkSession.builder.master("local[2]")
    for name, value in options.items():
        builder = builder.config(name, value)
    return builder.getOrCreate()


def in_spark(address: str, statements: list[str]) -> list[list[list[Any]]]:
    """Return the rows of each statement."""
    session = spark_session(address)
    return [[list(row) for row in session.sql(statement).collect()] for statement in statements]


def in_duckdb(address: str, statements: list[str]) -> list[list[list[Any]]]:
    """Return the rows of each statement."""
    import duckdb

    connection = duckdb.connect()
    for name in ("avro", "httpfs", "iceberg"):
        (file,) = Path(site.getsitepackages()[0]).glob(f"duckdb_extension_{name}/**/*.duckdb_extension")
        connection.execute(f"LOAD '{file}'")
    connection.execute(f"ATTACH '' AS shop (TYPE iceberg, ENDPOINT '{address}', AUTHORIZATION_TYPE 'none')")
    connection.execute("USE shop.gold")
    return [[list(row) for row in connection.execute(statement).fetchall()] for statement in statements]


if __name__ == "__main__":
    engine = {"spark": in_spark, "duckdb": in_duckdb}[sys.argv[1]]
    print(json.dumps(engine(sys.argv[2], sys.argv[3:]), default=str))
