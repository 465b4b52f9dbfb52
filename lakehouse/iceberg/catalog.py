"""The Iceberg catalog: opens it, and loads, creates, evolves and drops tables."""

from __future__ import annotations

import contextlib
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import (
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.table import Table as IcebergTable

from lakehouse.errors import SettingsError, ShopSphereError, TableNotFound
from lakehouse.iceberg.errors import catalog_errors
from lakehouse.iceberg.file_io import NonEmptyFileIO
from lakehouse.iceberg.schema import can_evolve, declared_types, iceberg_schema, partition_spec, table_comment
from lakehouse.iceberg.table_handle import TableHandle
from lakehouse.settings import LakeSettings
from lakehouse.table import Table

FORMAT_VERSION = 2
"""Of the Iceberg specification. Version 3 has row lineage and deletion vectors, which this code does not write."""
TABLE_PROPERTIES = {
    "format-version": str(FORMAT_VERSION),
    # a stale writer must fail instead of writing its rows twice
    "commit.retry.num-retries": "0",
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "20",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
    # small row groups, so that a look-up of scattered keys decodes little
    "write.parquet.row-group-limit": "65536",
    "write.parquet.compression-codec": "zstd",
}


class Lake:
    """The catalog, and the tables in it."""

    def __init__(self, settings: LakeSettings) -> None:
        self.settings = settings

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog of the settings. Raises SettingsError if it cannot be opened."""
        properties = dict(self.settings.catalog.properties)
        implementation = {"py-io-impl": f"{NonEmptyFileIO.__module__}.{NonEmptyFileIO.__qualname__}"}
        if not properties:
            home = Path(self.settings.home).absolute()
            (home / "warehouse").mkdir(parents=True, exist_ok=True)
            properties = {"type": "sql", "uri": f"sqlite:///{home / 'catalog.db'}", "warehouse": f"file://{home / 'warehouse'}"}
        try:
            catalog = load_catalog(self.settings.catalog.name, **implementation | properties)
            catalog.list_namespaces()
            return catalog
        except Exception as error:  # each kind of catalog raises its own errors
            # show only the catalog's type, since its address may contain a password
            shown = f"'{self.settings.catalog.name}' of type {properties.get('type', 'unknown')}"
            raise SettingsError(
                f"The Iceberg catalog {shown} cannot be opened ({type(error).__name__}). "
                "Correct the [catalog] section of the settings, or start the catalog.",
                remedy="debug",
            ) from error

    def load(self, table: Table, *, create: bool = True, evolve: bool = False) -> TableHandle:
        """Load a table; create it if it does not exist, or raise TableNotFound with `create=False`.

        Declared columns that the stored table lacks are added. `evolve` is for the writer of a derived table: a column whose
        declared type is wider is promoted, and a table that Iceberg cannot evolve to its declaration is dropped and created
        again, empty. Raises CatalogUnreachable, and ShopSphereError for a table of another Iceberg format version.
        """
        catalog = self.catalog
        with catalog_errors(table.name):
            return self._load(catalog, table, create=create, evolve=evolve)

    def _load(self, catalog: Catalog, table: Table, *, create: bool, evolve: bool) -> TableHandle:
        try:
            handle = TableHandle(table, _of_supported_version(catalog.load_table(table.name)))
        except NoSuchTableError:
            if not create:
                raise TableNotFound(
                    f"{table.name} does not exist yet. A run creates it; tables of a model are created by its training.",
                    remedy="run",
                ) from None
        else:
            if not evolve or can_evolve(table, handle.metadata.schema(), handle.iceberg_table.spec()):
                stored = handle.arrow_schema.names
                handle.evolve_schema(pa.schema([f for f in declared_types(table) if evolve or f.name not in stored]))
                handle.update_documentation()
                return handle
            if not self._drop_if_unchanged(catalog, handle):
                return self._load(catalog, table, create=create, evolve=evolve)
        return self._create(catalog, table)

    def _drop_if_unchanged(self, catalog: Catalog, handle: TableHandle) -> bool:
        """Drop a table unless another driver has re-created it since it was loaded; return whether it is gone.

        Catalogs have no conditional drop: a table re-created between this check and the drop is still dropped.
        """
        with contextlib.suppress(NoSuchTableError):
            if catalog.load_table(handle.table.name).metadata.table_uuid != handle.metadata.table_uuid:
                return False
            catalog.drop_table(handle.table.name)
        return True

    def _create(self, catalog: Catalog, table: Table) -> TableHandle:
        """Create a table, or load it if another writer has just created it."""
        with contextlib.suppress(NamespaceAlreadyExistsError):
            catalog.create_namespace(table.layer)
        schema = iceberg_schema(table)
        try:
            iceberg_table = catalog.create_table(
                table.name,
                schema,
                partition_spec=partition_spec(table, schema),
                properties={**TABLE_PROPERTIES, "comment": table_comment(table), "owner": table.owner},
            )
        except TableAlreadyExistsError:
            iceberg_table = _of_supported_version(catalog.load_table(table.name))
        return TableHandle(table, iceberg_table)

    def drop(self, table: Table) -> None:
        """Drop a table from the catalog, even if files of it are missing. Its files stay. Raises CatalogUnreachable."""
        catalog = self.catalog
        with catalog_errors(table.name), contextlib.suppress(NoSuchTableError):
            catalog.drop_table(table.name)

    def exists(self, table: Table) -> bool:
        """Return whether the table exists. Raises CatalogUnreachable."""
        catalog = self.catalog
        with catalog_errors(table.name):
            return catalog.table_exists(table.name)


def _of_supported_version(iceberg_table: IcebergTable) -> IcebergTable:
    """Return the table. Raises ShopSphereError if it has another Iceberg format version than the one that is written here."""
    if (version := iceberg_table.metadata.format_version) != FORMAT_VERSION:
        raise ShopSphereError(
            f"{'.'.join(iceberg_table.name())} has Iceberg format version {version}, expected {FORMAT_VERSION}. Another engine "
            "has probably upgraded it, which cannot be undone: restore the table's metadata from before the upgrade, or copy "
            "its rows to a new table of that name with format version 2."
        )
    return iceberg_table
