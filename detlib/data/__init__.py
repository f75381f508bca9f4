"""Datasets, data loaders and transforms."""

# Imported for their effect: the built-in names and the formats that the catalogs know.
from detlib.data import datasets, formats, samplers, transforms
from detlib.data.build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from detlib.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detlib.data.common import DatasetFromList, MapDataset, ToIterableDataset
from detlib.data.dataset_mapper import DatasetMapper, DetrDatasetMapper
from detlib.data.panoptic_mapper import PanopticDatasetMapper

__all__ = [
    "DatasetCatalog",
    "DatasetFromList",
    "DatasetMapper",
    "DetrDatasetMapper",
    "MapDataset",
    "Metadata",
    "MetadataCatalog",
    "PanopticDatasetMapper",
    "ToIterableDataset",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "datasets",
    "formats",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "samplers",
    "transforms",
]
