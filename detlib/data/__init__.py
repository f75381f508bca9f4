"""Data sets, loaders and transforms."""

# Imported for their effect: the built-in names and the formats that the catalogs know.
from . import datasets, formats, samplers, transforms
from .build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset, ToIterableDataset
from .dataset_mapper import DatasetMapper
from .detr_dataset_mapper import DetrDatasetMapper
from .panoptic_mapper import PanopticDatasetMapper

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
