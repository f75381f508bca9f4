"""Data sets, loaders and transforms."""

# Imported for their effect: the built-in names and the addresses that the catalogs know.
from . import addresses, datasets
from .catalog import DatasetCatalog, Metadata, MetadataCatalog

__all__ = ["DatasetCatalog", "Metadata", "MetadataCatalog", "addresses", "datasets"]
