"""Open what users have: networks from modules or libraries, weights from files, and data in many layouts.

The networks and data of the paper's experiments are here too, by name: `architectures`, `checkpoints` and `named`.
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
