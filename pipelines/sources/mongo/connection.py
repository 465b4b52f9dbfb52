"""Connections to MongoDB."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymongo
from bson import CodecOptions
from bson.codec_options import DatetimeConversion
from pymongo.collection import Collection
from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from pymongo.uri_parser import parse_uri

from lakehouse.errors import SourceError
from pipelines.settings import MongoSettings
from pipelines.sources.mongo.errors import mongo_errors

SERVER_SECONDS = 10
"""How long a server may take to answer."""
CODEC: CodecOptions[dict[str, Any]] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_MS, unicode_decode_error_handler="backslashreplace"
)

Document = dict[str, Any]


@contextmanager
def open_collection(settings: MongoSettings) -> Iterator[Collection[Document]]:
    """Open the collection on a connection of its own.

    Raises SourceError when mongo.uri is missing or malformed, and as `mongo_errors` does.
    """
    uri = settings.uri.get_secret_value()
    if not uri:
        raise SourceError(
            "MongoDB: mongo.uri is not set. Set it (SHOPSPHERE_MONGO__URI), or disable the source "
            "(SHOPSPHERE_MONGO__ENABLED=false)."
        )
    try:
        hosts = ", ".join(f"{host}:{port}" for host, port in parse_uri(uri)["nodelist"])
        client: pymongo.MongoClient[Document] = pymongo.MongoClient(
            uri,
            serverSelectionTimeoutMS=SERVER_SECONDS * 1000,
            connectTimeoutMS=SERVER_SECONDS * 1000,
            maxPoolSize=1,
            appname="shopsphere",
        )
    except (InvalidURI, ConfigurationError, ValueError, TypeError):
        raise SourceError(
            "MongoDB: mongo.uri is not a valid MongoDB URI. Write it as mongodb://user:password@host:27017/?replicaSet=rs0, "
            "with special characters in the password percent-encoded (@ as %40)."
        ) from None
    except PyMongoError as error:
        raise SourceError(
            f"MongoDB: the host in mongo.uri cannot be resolved ({type(error).__name__}). Correct it (SHOPSPHERE_MONGO__URI)."
        ) from None
    try:
        with mongo_errors(settings, hosts, SERVER_SECONDS):
            yield client[settings.database].get_collection(settings.collection, codec_options=CODEC)
    finally:
        client.close()


def is_standalone(collection: Collection[Document]) -> bool:
    """Return whether the server is neither part of a replica set nor a router of a sharded cluster.

    If it has change streams nevertheless, it emulates MongoDB. Uses what the driver has learned from the server, because not
    every server has the command `hello`.
    """
    client = collection.database.client
    client.admin.command("ping")
    return all(server.server_type_name == "Standalone" for server in client.topology_description.server_descriptions().values())
