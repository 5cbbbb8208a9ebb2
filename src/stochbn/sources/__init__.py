"""What a user has: a network named by where it is built, weights in a file, and data in one of many layouts.

The paper's experiments have networks and data of their own; nothing here knows of them.
"""

from stochbn.sources.hub import DataError
from stochbn.sources.loaders import LoaderObjects
from stochbn.sources.networks import Built, build, parse_arguments, prepared
from stochbn.sources.objects import Chunk, Objects, RowObjects, Stream
from stochbn.sources.opening import Columns, open_objects, renumbered
from stochbn.sources.parquet import ParquetObjects, holds_parquet
from stochbn.sources.pictures import Decoding, Preprocessing, channels_of
from stochbn.sources.stores import is_url, stored
from stochbn.sources.weights import load_weights

__all__ = [
    "Built",
    "Chunk",
    "Columns",
    "DataError",
    "Decoding",
    "LoaderObjects",
    "Objects",
    "ParquetObjects",
    "Preprocessing",
    "RowObjects",
    "Stream",
    "build",
    "channels_of",
    "holds_parquet",
    "is_url",
    "load_weights",
    "open_objects",
    "parse_arguments",
    "prepared",
    "renumbered",
    "stored",
]
