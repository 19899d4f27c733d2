"""Bring a data set into the canonical form (rule ``dataset``)."""

from typing import TYPE_CHECKING

from detrojan import registry
from detrojan.settings import Augmentation
from detrojan.stages import data_card, ingest
from detrojan.storage import artifacts, records
from detrojan.workflow import job, sources

if TYPE_CHECKING:
    from snakemake.iocontainers import snakemake

with job.run(snakemake) as cell:
    source = registry.load("datasets", snakemake.params.source, snakemake.params.source_settings)
    augmentation = Augmentation(**snakemake.params.augmentation)
    with sources.unchanged(source) as origin:
        (train, held_out, test), card = ingest.build_with_card(
            source, name=cell.dataset, augmentation=augmentation, **snakemake.params.options
        )
    artifacts.write_images(train, snakemake.output.train)
    artifacts.write_images(held_out, snakemake.output.held_out)
    artifacts.write_images(test, snakemake.output.test)
    origin |= {"planned": snakemake.params.images}
    records.write_card(cell.axes | card | origin, snakemake.output.card)
    data_card.log(card)
