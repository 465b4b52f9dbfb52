"""Writing the data files and position delete files of a table, in any process."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io import FileIO
from pyiceberg.io.pyarrow import _dataframe_to_data_files
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.typedef import Record

from lakehouse.iceberg.reader import FILE, POS, File
from lakehouse.iceberg.schema import arrow_schema, as_arrow

FILE_PATH_FIELD_ID, POS_FIELD_ID = 2147483546, 2147483545
"""Field ids of a position delete file, from the Iceberg spec, section 'Reserved Field IDs'."""
POSITION_DELETE_SCHEMA = pa.schema(
    [
        pa.field("file_path", pa.string(), nullable=False, metadata={"PARQUET:field_id": str(FILE_PATH_FIELD_ID)}),
        pa.field("pos", pa.int64(), nullable=False, metadata={"PARQUET:field_id": str(POS_FIELD_ID)}),
    ]
)


@dataclass(frozen=True)
class FileWriter:
    """Writes data files and position delete files in any process. Picklable; holds no connection."""

    io: FileIO
    metadata: TableMetadata

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the table."""
        return arrow_schema(self.metadata.schema())

    def write(self, frame: pl.DataFrame | pa.Table) -> list[DataFile]:
        """Write rows to new data files. No snapshot refers to them until they are committed."""
        table = frame if isinstance(frame, pa.Table) else as_arrow(frame, self.schema)
        if table.num_rows == 0:
            return []
        return list(
            _dataframe_to_data_files(
                table_metadata=self.metadata, df=table, io=self.io, write_uuid=uuid.uuid4(), counter=itertools.count(0)
            )
        )

    def write_deletes(self, files: Sequence[File], locations: pl.DataFrame) -> list[DataFile]:
        """Write one position delete file per partition; `locations` has `_file` (index in `files`) and `_pos`."""
        if locations.height == 0:
            return []
        paths = pl.DataFrame({FILE: pl.Series(range(len(files)), dtype=pl.UInt32), "file_path": [file.path for file in files]})
        located = locations.select(FILE, pl.col(POS).cast(pl.Int64).alias("pos")).join(paths, on=FILE).sort("file_path", "pos")
        by_partition: dict[tuple[int, str], list[int]] = {}
        for number, file in enumerate(files):
            by_partition.setdefault((file.spec_id, repr(file.partition)), []).append(number)
        result = []
        for numbers in by_partition.values():
            part = located.filter(pl.col(FILE).is_in(numbers))
            if part.height:
                file = files[numbers[0]]
                result.append(self._write_delete_file(part, file.spec_id, file.partition))
        return result

    def _write_delete_file(self, part: pl.DataFrame, spec_id: int, partition: Record) -> DataFile:
        columns = part.select("file_path", "pos").to_arrow(compat_level=pl.CompatLevel.oldest())
        table = pa.table([columns["file_path"].cast(pa.string()), columns["pos"]], schema=POSITION_DELETE_SCHEMA)
        location = f"{self.metadata.location}/data/{uuid.uuid4()}-deletes.parquet"
        output = self.io.new_output(location)
        with output.create() as stream:
            pq.write_table(table, stream, compression="zstd")
        first, last = part["file_path"].min(), part["file_path"].max()
        deletes = DataFile.from_args(
            content=DataFileContent.POSITION_DELETES,
            file_path=location,
            file_format=FileFormat.PARQUET,
            partition=partition,
            record_count=part.height,
            file_size_in_bytes=len(output),
            lower_bounds={FILE_PATH_FIELD_ID: str(first).encode()},
            upper_bounds={FILE_PATH_FIELD_ID: str(last).encode()},
            sort_order_id=None,
            equality_ids=None,
            key_metadata=None,
        )
        deletes.spec_id = spec_id
        return deletes
