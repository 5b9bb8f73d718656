"""Rows of `datasets`: one class a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from dsd.config.base import Kind, ParamsModel, Positive, Share, Template

if TYPE_CHECKING:
    from dsd.config.load import Params


class DatasetParams(Kind):
    """A row of `datasets`; its `kind` selects the class.

    few_shot, validation: sizes of these splits, as shares of `size` or of the training examples.
    sample: number of the random few-shot split; validation and test stay the same.
    draws_per_level: if set, replaces that of `noise`, because cost grows with the number of candidates.
    """

    selector: ClassVar[str] = "kind"
    package: ClassVar[str] = "dsd.datasets"
    generated: ClassVar[bool] = False  # drawn by `dsd.scenes`: nothing is fetched

    few_shot: Share
    sample: int
    validation: Share
    draws_per_level: Positive | None = Field(default=None)

    if TYPE_CHECKING:  # a field of each kind

        @property
        def kind(self) -> str: ...

    def check_learning(self, name: str, params: Params, few_shot: int) -> None:
        """Check that methods that are trained have an example, where the few-shot split has so many.

        Raises:
            ValueError: they have none; the message starts with the key.
        """
        trained = [method for method, row in params.methods.items() if not row.zero_shot]
        if trained and few_shot < 1:
            problem = f"{self.few_shot} leaves no example, but {trained[0]} is trained on them"
            raise ValueError(f"datasets.{name}.few_shot: {problem}")


OWN_KEYS = {"scenes-ref": "candidates", "scenes-vqa": "binary", "scenes-cls": "template"}  # of kinds of drawn datasets


class DrawnDataset(DatasetParams):
    """A benchmark of `size` rendered scenes. Each of the last three keys belongs to one kind, see `OWN_KEYS`."""

    generated: ClassVar[bool] = True

    kind: Literal["scenes-com", "scenes-ref", "scenes-vqa", "scenes-cls"]
    size: Positive
    test: Positive
    candidates: Annotated[int, Field(ge=2, le=64)] | None = Field(default=None)
    binary: Share | None = Field(default=None)
    template: Template | None = Field(default=None)

    def check(self, name: str, params: Params) -> None:
        for key in OWN_KEYS.values():
            given, needed = getattr(self, key) is not None, OWN_KEYS.get(self.kind) == key
            if given != needed:
                raise ValueError(f"datasets.{name}.{key}: {self.kind} {'needs it' if needed else 'takes none'}")
        if self.binary in (0, 1):
            raise ValueError(f"datasets.{name}.binary: {self.binary:g} leaves one kind of questions without an example")
        taken = round(self.few_shot * self.size) + round(self.validation * self.size) + self.test
        if taken > self.size:
            raise ValueError(f"datasets.{name}.size: {self.size}, but its three splits have {taken} examples")
        self.check_learning(name, params, round(self.few_shot * self.size))


class PublishedDataset(DatasetParams):
    """A published benchmark.

    test: how many test examples are used, sampled by `seed`; null uses all.
    missing: how many of the selected images may be unavailable before a run fails.
    """

    test: Positive | None
    missing: Annotated[int, Field(ge=0)]


class FilesParams(ParamsModel):
    """Patterns of the files of each split in a repository, such as "data/train-*.parquet".

    If `train` is null, all splits are taken from the files of `test`, and no two splits share an image.
    """

    train: str | None
    test: str


class RepositoryDataset(PublishedDataset):
    """A hub dataset `source` at `revision` (a commit), or a folder with the same files and revision null."""

    source: str
    revision: str | None
    files: FilesParams


class ClassifiedDataset(RepositoryDataset):
    """Images with class labels; the texts are the class names in the template."""

    kind: Literal["cifar10", "stl10", "fgvc-aircraft"]
    template: Template


class RefcocogDataset(RepositoryDataset):
    kind: Literal["refcocog"]
    candidates: Annotated[int, Field(ge=2)]  # expressions per image


class Vqav2Dataset(RepositoryDataset):
    kind: Literal["vqav2"]
    answers: Annotated[int, Field(ge=2)]  # candidates: the most frequent answers of the training files


class WinogroundDataset(RepositoryDataset):
    kind: Literal["winoground"]


class UrlParams(ParamsModel):
    """A file by URL or path; `sha256`, if set, is checked."""

    source: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None


class VisualGenomeParams(ParamsModel):
    """The Visual Genome annotations that triplets are mutated from; each file may be a .zip that holds only it."""

    relationships: UrlParams
    image_data: UrlParams
    object_aliases: UrlParams
    relationship_aliases: UrlParams


class ComvgDataset(PublishedDataset):
    """The published ComVG list as the test split.

    images: image URLs, with {} for the image number of the list; on a missing image the next URL is tried.
    annotations, size: if set, `size` examples mutated from Visual Genome on other images are what `few_shot` and
        `validation` are shares of.
    """

    kind: Literal["comvg"]
    list: UrlParams
    images: Annotated[tuple[Template, ...], Field(min_length=1)]
    annotations: VisualGenomeParams | None
    size: Positive | None


class VisualGenomeDataset(PublishedDataset):
    """`size` examples mutated from Visual Genome for all splits; image URLs are those of its image data."""

    kind: Literal["visual-genome"]
    annotations: VisualGenomeParams
    size: Positive
    test: Positive


class FolderDataset(PublishedDataset):
    """The user's own images: `table` is a CSV in the folder `source`; see `dsd.datasets.folder`."""

    kind: Literal["folder"]
    source: str
    table: str
