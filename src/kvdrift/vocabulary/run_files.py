"""Names of the files that hold a run's drift table: parquet where pyarrow is installed, else gzipped CSV."""

from importlib.util import find_spec

PARQUET, CSV = "drift.parquet", "drift.csv.gz"


def table_name() -> str:
    """Return the name of the file that is written here."""
    return CSV if find_spec("pyarrow") is None else PARQUET
