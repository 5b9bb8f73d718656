"""Typed, frozen params. The code has no default values: everything that a result depends on is in params.yaml."""

# ruff: noqa: F401  (this module only re-exports)

from dsd.config.datasets import (
    ClassifiedDataset,
    ComvgDataset,
    DatasetParams,
    DrawnDataset,
    FolderDataset,
    PublishedDataset,
    RefcocogDataset,
    RepositoryDataset,
    UrlParams,
    VisualGenomeDataset,
    VisualGenomeParams,
    Vqav2Dataset,
    WinogroundDataset,
)
from dsd.config.experiments import AblationParams, EvaluateParams, RacesParams, StudyParams
from dsd.config.files import assign, by_file, file_of, files, merged, node_at, parsed, read
from dsd.config.load import Params, load, mistake
from dsd.config.methods import (
    EXHAUSTIVE,
    ContrastiveMethod,
    CrossAttentionMethod,
    DenoisingMethod,
    DiffusionMethod,
    FusionMethod,
    FusionParams,
    HierarchicalSchedule,
    MethodParams,
    RacingSchedule,
    ReleasedMethod,
    ScheduledMethod,
    ScheduleParams,
    ShortlistParams,
    StagedSchedule,
    TrainingParams,
)
from dsd.config.models import BackboneParams, ContextParams, EvidenceParams, ImageParams, NoiseParams, RuntimeParams
from dsd.config.operations import (
    Bounds,
    FitParams,
    FolderSource,
    GateParams,
    GateRow,
    HubSource,
    PretrainParams,
    RegisteredSource,
)
